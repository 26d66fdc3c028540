"""The server's API key also guards what vLLM leaves open and a recommender should not.

vLLM asks for the key under ``/v1``, ``/v2`` and ``/inference``. ``/invocations`` answers like ``/v1/completions``, and
``/tokenize`` tells the semantic IDs of items; ``/scale_elastic_ep`` changes the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

GUARDED = ("/invocations", "/tokenize", "/detokenize", "/generative_scoring", "/scale_elastic_ep")


def authentication_middleware() -> type:
    """vLLM's class, which a server has exactly where it has a key."""
    try:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.serve.utils.server_utils import AuthenticationMiddleware
    return AuthenticationMiddleware


def guard(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap its ``__call__``: vLLM's own check, on more paths."""

    def call(self: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        asks = scope["type"] == "http" and scope["method"] != "OPTIONS"
        if asks and is_guarded(scope) and not self.verify_token(Headers(scope=scope)):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        return original(self, scope, receive, send)

    return call


def is_guarded(scope: Any) -> bool:
    return scope["path"].removeprefix(scope.get("root_path", "")).startswith(GUARDED)
