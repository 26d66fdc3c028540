"""``POST /v1/completions`` for the request that nearly all clients send; vLLM's own handler takes every other.

vLLM's handler spends 0.7 ms of CPU on what a ranking never needs: sixty fields, sampling parameters, a model object a
choice. Here the common request is read into a few typed fields and answered from columns. Whatever it does not know (a
field, a header, a text for the tokenizer, an error to report) goes to vLLM's handler, as if it came from the client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from msgspec import Meta
from starlette.requests import ClientDisconnect
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion, RequestResponseMetadata, UsageInfo
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.tracing import extract_trace_headers
from vllm.utils import random_uuid

from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.admission import Admission
from nezha_vllm.frontend.body_limit import BodiesFull
from nezha_vllm.frontend.checked_route import CheckedRoute, Handler, use
from nezha_vllm.frontend.disconnect import unless_disconnected
from nezha_vllm.frontend.gate import put_in_front
from nezha_vllm.frontend.options import Plan, check_search, engine_params
from nezha_vllm.frontend.outcome import Outcome
from nezha_vllm.frontend.renderer import NezhaRenderer
from nezha_vllm.frontend.request_shape import LONGEST
from nezha_vllm.frontend.response_body import ResponseBody
from nezha_vllm.frontend.rules import read_rules
from nezha_vllm.frontend.seen_rules import LONG
from nezha_vllm.frontend.service import end_request, one_request
from nezha_vllm.frontend.tracing import traces

# headers and settings of a server that change what vLLM's handler does
LONG_WAY_HEADERS = {
    b"endpoint-load-metrics-format", b"x-data-parallel-rank", b"x-session-id", b"x-vllm-priority",
}  # fmt: skip
LONG_WAY_SETTINGS = ("request_logger", "enable_prompt_tokens_details", "enable_per_request_metrics")
Options = dict[str, bool | int | float | str | list[str | int]]


class CommonRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The fields that clients send, each in the one type that needs no interpretation.

    Those behind ``vllm_xargs`` have no effect; their types and bounds are vLLM's.
    """

    prompt: str | list[int]
    model: str | None = None
    n: int = 1
    use_beam_search: bool = False
    vllm_xargs: Options | None = None
    temperature: float | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: int | None = 16
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    user: Annotated[str, Meta(max_length=LONGEST)] | None = None
    stream: bool | None = False
    logprobs: None = None


class LongRequest(CommonRequest, forbid_unknown_fields=True):
    """The same, whose options may have come before: they are not read yet."""

    vllm_xargs: msgspec.Raw = msgspec.Raw(b"null")  # type: ignore[assignment]


class ShortWay:
    """What it needs of a running server of a NEZHA model. ``open`` is False where vLLM's handler does more."""

    def __init__(self, handler: OpenAIServingCompletion, state: Any) -> None:
        self.handler = handler
        self.renderer = handler.engine_client.renderer
        most = self.renderer.current.settings.max_concurrent_requests
        self.admission = Admission(most, handler.engine_client.output_processor.get_num_unfinished_requests)
        self.open = not any(getattr(handler, name, None) for name in LONG_WAY_SETTINGS) and not getattr(
            state, "enable_server_load_tracking", False
        )
        # every request that comes through a service mesh has the headers, whether or not this server traces
        self.traces = traces(handler.engine_client.vllm_config)
        self.decoder = msgspec.json.Decoder(CommonRequest)
        self.long_decoder = msgspec.json.Decoder(LongRequest)
        self.options_decoder = msgspec.json.Decoder(Options | None)
        if self.open:
            self.body = ResponseBody(handler.models.model_name(), getattr(handler, "system_fingerprint", None))

    def read(self, body: bytes) -> tuple[Plan, list[int]] | None:
        """Plan and complete prompt; None for a request that goes to vLLM's handler."""
        try:
            service = self.renderer.service
            request, asked = self._decode(body)
            seen = service.seen.find(asked)
            options = seen.options if seen else self._options(request, asked)
            if request.stream or (request.model and not self.handler.models.is_base_model(request.model)):
                return None
            default = {"beam_width": request.n} if request.use_beam_search else {}
            beam_width, validity = check_search(service, request.n, {**default, **options})
            token_ids = self.renderer.encode(request.prompt)
            if token_ids is None:
                return None
            rules = seen.rules if seen else read_rules(service, options, token_ids)
            if not seen:
                service.seen.keep(asked, options, rules)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, VLLMValidationError):
            return None
        plan = Plan(service, request.n, beam_width, validity, False, rules, as_choices=False)
        return plan, token_ids

    def _decode(self, body: bytes) -> tuple[CommonRequest, bytes]:
        """The request, and of a long one the bytes of its options, which are not read yet."""
        if len(body) < LONG:
            return self.decoder.decode(body), b""
        request = self.long_decoder.decode(body)
        return request, bytes(request.vllm_xargs)

    def _options(self, request: CommonRequest, asked: bytes) -> Options:
        return (self.options_decoder.decode(asked) if asked else request.vllm_xargs) or {}

    async def answer(self, request: Request, plan: Plan, token_ids: list[int]) -> Response:
        given = request.headers.get("x-request-id")
        request_id = f"cmpl-{random_uuid() if given is None else given}"
        created = int(time.time())
        request.state.request_metadata = metadata = RequestResponseMetadata(request_id=request_id)
        prompt = self.renderer.process_for_engine({"prompt_token_ids": token_ids}, time.time())
        params = engine_params(plan, RequestOutputKind.FINAL_ONLY)
        headers = extract_trace_headers(request.headers) if self.traces else None
        outputs = self.handler.engine_client.generate(prompt, params, f"{request_id}-0", trace_headers=headers)
        *_, output = [output async for output in outputs]
        if not hasattr(output, "answer"):  # aborted, or an error of the engine
            return await self._without_answer(output, request, created, metadata)
        coded = len(output.answer.item_ids) * plan.service.num_levels
        usage = UsageInfo(prompt_tokens=len(token_ids), completion_tokens=coded, total_tokens=len(token_ids) + coded)
        metadata.final_usage_info = usage
        return Response(self.body.encode(request_id, created, output.answer, usage), media_type="application/json")

    async def _without_answer(self, output: Any, request: Request, created: int, metadata: Any) -> Response:
        asked = CompletionRequest.model_validate_json(await request.body())
        response = self.handler.request_output_to_completion_response(
            [output], asked, metadata.request_id, created, self.handler.models.model_name(), None, metadata
        )
        return JSONResponse(response.model_dump())


@contextmanager
def admitted(request: Request | None, count: int) -> Iterator[bool]:
    """Whether so many prompts of a request that vLLM's handler answers may begin; else the route refuses it."""
    way = getattr(request.app.state, "nezha_short_way", None) if request is not None else None
    if request is None or way is None:
        yield True
        return
    with way.admission.prompts(count) as may:
        request.state.nezha_full = not may
        yield may


class CountedRoute(CheckedRoute):
    """vLLM's route with the limit on requests in front, and outcomes counted behind."""

    short = False  # whether the short way is tried

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        counted = metrics.active()
        if counted is None or scope["method"] not in self.methods:
            return await self._handle(scope, receive, send)
        outcome, begun = Outcome(send), time.perf_counter()
        try:
            await self._handle(scope, receive, outcome)
        finally:
            counted.count(outcome.name, time.perf_counter() - begun)

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        with one_request():
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Handler:
        long_way = super().get_route_handler()

        async def answer(request: Request) -> Response:
            way = _way(request)
            if way is None:
                return await long_way(request)
            try:
                body = await request.body()
            except ClientDisconnect:
                return JSONResponse(None)  # nobody reads it
            except BodiesFull:
                return way.admission.refusal()
            if way.admission.full:
                return way.admission.refusal()
            with way.admission.request():
                read = way.read(body) if self.short and way.open and _is_common(request) else None
                if read is None:
                    response = await long_way(request)
                    if getattr(request.state, "nezha_full", False):
                        return way.admission.refusal()
                else:
                    response = await unless_disconnected(request, way.answer(request, *read))
            end_request()  # the client may take its time with the answer
            return JSONResponse(None) if response is None else response  # nobody reads it

        return answer


class CompletionsRoute(CountedRoute):
    """The same with the short way in front of vLLM's handler."""

    short = True


def _is_common(request: Request) -> bool:
    headers = dict(request.scope["headers"])
    media_type = headers.get(b"content-type", b"").split(b";", 1)[0].lower()
    return media_type == b"application/json" and LONG_WAY_HEADERS.isdisjoint(headers)


def _way(request: Request) -> ShortWay | None:
    """None for other models."""
    state = request.app.state
    way = getattr(state, "nezha_short_way", None)
    if way is None:
        handler = getattr(state, "openai_serving_completion", None)
        if handler is None or not isinstance(handler.engine_client.renderer, NezhaRenderer):
            return None
        way = state.nezha_short_way = ShortWay(handler, state)
        routes = request.app.router.routes
        _to_the_front(routes)
        put_in_front(request.app, way.admission, {route.path for route in routes if isinstance(route, CountedRoute)})
    return way


def _to_the_front(routes: list[Any]) -> None:
    """Let the router, and the metrics that look for the route's name again, try this route first and not twentieth.

    No other route can answer less for it: this one is the first to match its only path and method.
    """
    place = next((place for place, route in enumerate(routes) if isinstance(route, CompletionsRoute)), 0)
    routes.insert(0, routes.pop(place))


def shorten(route: APIRoute) -> None:
    """Put the short way in front of a route's handler, and of every application's that includes the route later."""
    use(route, CompletionsRoute)
