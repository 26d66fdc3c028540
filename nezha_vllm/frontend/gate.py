"""A full API process turns requests away in front of the application.

Behind vLLM's middlewares and FastAPI's router the same refusal is 0.2 ms of CPU and not 0.06, most of which is the HTTP
server's: what it costs is missing to those who are answered.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers

from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.admission import Admission
from nezha_vllm.frontend.body_limit import MAX_BODY, Receive
from nezha_vllm.frontend.guard import authentication_middleware
from nezha_vllm.frontend.outcome import Send

# what is left out for a request that is refused here: its place in `http_requests_total`, and what is done here as well
PASSED_BY = {
    "AuthenticationMiddleware", "CORSMiddleware", "PrometheusInstrumentatorMiddleware", "ScalingMiddleware",
}  # fmt: skip


class Gate:
    """An ASGI application with refusals in front of it.

    Args:
        app: answers what is not refused, and those without the key.
        paths: of the routes with the limit.
        key: vLLM's middleware that asks for the API key; None if there is none.
    """

    def __init__(self, app: Any, admission: Admission, paths: Collection[str], key: Any = None) -> None:
        self._app, self._admission, self._paths, self._key = app, admission, paths, key
        response = admission.refusal()
        self._start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        self._body = {"type": "http.response.body", "body": response.body}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if not self._admission.full or not self._is_for(scope):
            return await self._app(scope, receive, send)
        here = await _read(receive)
        if here:
            await send(self._start)
            await send(self._body)
        counted = metrics.active()
        if counted is not None:
            counted.count("overloaded" if here else "disconnected", 0.0)

    def _is_for(self, scope: Any) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        if scope["path"].removeprefix(scope.get("root_path", "")) not in self._paths:
            return False
        headers = Headers(scope=scope)
        if "origin" in headers:  # a browser, which gets its answer with the headers of CORS or not at all
            return False
        return self._key is None or self._key.verify_token(headers)


async def _read(receive: Receive) -> bool:
    """Take a body and drop it; False if its client has left.

    An answer in the middle of an upload, and a connection closed behind it, is a reset to its client. The rest of one
    that is larger than any is the server's to drop.
    """
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        size += len(message.get("body", b""))
        if size > MAX_BODY or not message.get("more_body", False):
            return True


def put_in_front(app: FastAPI, admission: Admission, paths: Collection[str]) -> None:
    """To be called when the application has its middlewares. One that we do not know may have to see each request."""
    if not admission.limited or any(_name(middleware) not in PASSED_BY for middleware in app.user_middleware):
        return
    asks = [middleware for middleware in app.user_middleware if middleware.cls is authentication_middleware()]
    key = asks[0].cls(app, *asks[0].args, **asks[0].kwargs) if asks else None
    app.middleware_stack = Gate(app.middleware_stack, admission, paths, key)


def _name(middleware: Any) -> str:
    return getattr(middleware.cls, "__name__", "")
