"""A route that nobody can hold up or bring to a 500 by the body of a request."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, request_response
from vllm.exceptions import VLLMValidationError

from nezha_vllm.frontend.body_limit import Body
from nezha_vllm.frontend.errors import bad_request
from nezha_vllm.frontend.renderer import NezhaRenderer
from nezha_vllm.frontend.request_shape import check_shape

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
# what vLLM's validators raise where they take a value for an object that is none
OF_VALIDATORS = (AttributeError, TypeError, KeyError, IndexError, OverflowError)
UNREADABLE = "a field has a value of a type that it does not take; /openapi.json has the types of all fields"


class CheckedRoute(APIRoute):
    """FastAPI's route with limits in front."""

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        with Body(receive) as body:
            await super().handle(scope, body.receive, send)

    def get_route_handler(self) -> Handler:
        return _checked(super().get_route_handler())


def reached(request: Request | None) -> None:
    """The request was read and is being answered: an error from now on is the server's."""
    if request is not None:
        request.state.nezha_reached = True


def use(route: APIRoute, kind: type[CheckedRoute]) -> None:
    """Make it a route of this kind, also in every application that includes it later."""
    if not isinstance(route, kind):
        route.__class__ = kind
        route.app = request_response(route.get_route_handler())


def _checked(handler: Handler) -> Handler:
    async def answer(request: Request) -> Response:
        state = request.app.state
        if not isinstance(getattr(getattr(state, "engine_client", None), "renderer", None), NezhaRenderer):
            return await handler(request)
        try:
            check_shape(await request.body())
        except VLLMValidationError as error:
            return _refuse(state, error)
        try:
            return await handler(request)
        except OF_VALIDATORS:
            if getattr(request.state, "nezha_reached", False):
                raise
            return _refuse(state, bad_request("body", UNREADABLE))

    return answer


def _refuse(state: Any, error: VLLMValidationError) -> Response:
    refusal = state.openai_serving_completion.create_error_response(error)
    return JSONResponse(refusal.model_dump(), refusal.error.code)
