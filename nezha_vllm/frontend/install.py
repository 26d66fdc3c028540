"""Every change to vLLM's own classes, in one place, each with a check that fails loudly when vLLM has changed.

vLLM has no first-class way to turn one engine request into n choices, so a few classes of the API process are wrapped.
Each wrapper passes requests of other models through untouched. Nothing is changed until a NEZHA model is served.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute

from nezha_vllm.frontend.service import end_request, one_request, service_for_request, service_of

_INSTALLED: set[tuple[type, str]] = set()


class VllmChangedError(RuntimeError):
    """A function of vLLM that we wrap is gone or takes other arguments."""


def install() -> None:
    """Wrap vLLM's API classes once in this process. Raises ``VllmChangedError`` before anything is changed."""
    from nezha_vllm.frontend.short_way import shorten

    wrappers = _wrappers()
    for owner, name, arguments in [wrapper[:3] for wrapper in wrappers] + _called():
        probe(owner, name, arguments)
    route = completions_route()
    for owner, name, _, wrapper in wrappers:
        if (owner, name) not in _INSTALLED:
            original = inspect.getattr_static(owner, name)
            function = original.__func__ if isinstance(original, classmethod) else original
            wrapped = functools.wraps(function)(wrapper(function))
            setattr(owner, name, classmethod(wrapped) if isinstance(original, classmethod) else wrapped)
            _INSTALLED.add((owner, name))
    shorten(route)
    _count_invocations()


def _count_invocations() -> None:
    """Amazon SageMaker's name for /v1/completions: made anew for each application, and not by a router."""
    from vllm.entrypoints.serve.sagemaker import api_router

    from nezha_vllm.frontend.checked_route import use
    from nezha_vllm.frontend.short_way import CountedRoute

    original = api_router.attach_router
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def attach_router(app: Any, *args: Any, **kwargs: Any) -> None:
        original(app, *args, **kwargs)
        for route in app.routes:
            if isinstance(route, APIRoute) and route.path == "/invocations":
                use(route, CountedRoute)

    api_router.attach_router = attach_router


def completions_route() -> APIRoute:
    """vLLM's route, before an application includes it. Raises ``VllmChangedError``."""
    import vllm
    from vllm.entrypoints.openai.completion.api_router import router

    for route in router.routes:
        if isinstance(route, APIRoute) and route.path == "/v1/completions" and route.methods == {"POST"}:
            return route
    raise VllmChangedError(f"POST /v1/completions is gone from vLLM {vllm.__version__}: install a tested version")


def probe(owner: type, name: str, arguments: tuple[str, ...]) -> None:
    """Check that ``owner.name`` exists and its first arguments are the ones our wrapper counts on."""
    import vllm

    function = getattr(owner, name, None)
    place = f"{owner.__module__}.{owner.__qualname__}.{name}"
    remedy = f"vLLM {vllm.__version__} has changed; install a tested version or report this to nezha-vllm"
    if function is None:
        raise VllmChangedError(f"{place} is gone: {remedy}")
    found = [argument for argument in inspect.signature(function).parameters if argument not in ("self", "cls")]
    if tuple(found[: len(arguments)]) != arguments:
        raise VllmChangedError(f"{place} takes {found}, expected it to begin with {list(arguments)}: {remedy}")


def _wrappers() -> list[tuple[type, str, tuple[str, ...], Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import DPLBAsyncMPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    from nezha_vllm.frontend.accepting import accept_more, balanced_server
    from nezha_vllm.frontend.guard import authentication_middleware, guard
    from nezha_vllm.frontend.home_engine import stay_home

    server = balanced_server()
    build_response = ("final_res_batch", "request")
    stream = ("request", "engine_inputs", "result_generator")
    return [
        (InputProcessor, "process_inputs", ("request_id", "prompt", "params"), _process_inputs),
        (AsyncLLM, "_run_output_handler", (), _run_output_handler),
        (DPLBAsyncMPClient, "get_core_engine_for_request", ("request",), stay_home),
        (RequestState, "from_new_request", ("tokenizer", "request"), _from_new_request),
        (OutputProcessor, "do_tracing", ("engine_core_output", "req_state"), _do_tracing),
        (authentication_middleware(), "__call__", ("scope", "receive", "send"), guard),
        (OpenAIServingCompletion, "__init__", ("engine_client", "models"), _make_metrics),
        (OpenAIServingCompletion, "create_completion", ("request", "raw_request"), _create_completion),
        (OpenAIServingCompletion, "request_output_to_completion_response", build_response, _build_response),
        (OpenAIServingCompletion, "completion_stream_generator", stream, _stream),
        (OpenAIServingChat, "create_chat_completion", ("request", "raw_request"), _refuse_chat),
        (OpenAIServingChatBatch, "create_batch_chat_completion", ("request", "raw_request"), _refuse_chat),
        (OpenAIServingResponses, "create_responses", ("request", "raw_request"), _refuse_chat),
        (BeamSearchOfflineMixin, "beam_search", ("prompts", "params"), _beam_search_offline),
        *([(server, "_accept", ("sock",), accept_more)] if server else []),
    ]


def _called() -> list[tuple[type, str, tuple[str, ...]]]:
    """What the short way (``short_way``) and the one who follows a store (``follow``) call."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.hf import HfRenderer
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.output_processor import OutputProcessor

    from nezha_vllm.frontend.accepting import balanced_server
    from nezha_vllm.frontend.guard import authentication_middleware

    server = balanced_server()
    accepting = (("_publish_load", ()), ("_track", ("coro",)), ("_connect", ("loop", "conn")))
    return [
        *([(server, *called) for called in accepting] if server else []),
        (authentication_middleware(), "verify_token", ("headers",)),
        (AsyncMPClient, "_call_utility_async", ("method",)),
        (AsyncLLM, "generate", ("prompt", "sampling_params", "request_id")),
        (OutputProcessor, "get_num_unfinished_requests", ()),
        (HfRenderer, "process_for_engine", ("prompt", "arrival_time")),
        (OpenAIServingModels, "is_base_model", ("model_name",)),
        (OpenAIServingModels, "model_name", ("lora_request",)),
    ]


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options, complete the prompt, and send the engine the little it needs."""
    from vllm import SamplingParams

    from nezha_vllm.frontend.errors import bad_request
    from nezha_vllm.frontend.options import PLAN, PROMPT, engine_params, make_plan
    from nezha_vllm.frontend.prompts import complete_prompt
    from nezha_vllm.frontend.rules import PromptTokens

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # the renderer's own service: another engine of this process may serve the same folder with other settings
        service = getattr(self.renderer, "service", None)
        if service is None or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        if not -(2**63) <= kwargs.get("priority", 0) < 2**63:  # of a header, which vLLM does not check
            raise bad_request("priority", "priority must be an integer of 64 bits")
        if hasattr(params, PLAN):  # the short way has checked everything
            request = original(self, request_id, prompt, params, *args, **kwargs)
            request.sampling_params = params
            request.prompt_token_ids = service.engine_tokens(request.prompt_token_ids)
            return request
        tokens = prompt.get("prompt_token_ids")
        service = getattr(tokens, "service", None) or service
        # vLLM checks and deep-copies what it is given, 0.1 ms for a user's parameters; these it takes as they are
        plan = make_plan(service, params, tokens or ())
        if isinstance(tokens, PromptTokens):
            tokens.service = None  # vLLM keeps them while it streams, and the plan ends with the search
        params = engine_params(plan, params.output_kind)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        completed = complete_prompt(request.prompt_token_ids, service)
        setattr(params, PROMPT, completed)
        request.prompt_token_ids = service.engine_tokens(completed)
        request.sampling_params = params
        return request

    return process_inputs


def _from_new_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give our requests a state that turns one engine output into n choices, and tells the prompt as it may be sent."""
    from nezha_vllm.frontend.answers import adopt
    from nezha_vllm.frontend.options import PLAN, PROMPT

    def from_new_request(cls: type, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(cls, tokenizer, request, *args, **kwargs)
        plan = getattr(request.sampling_params, PLAN, None)
        if plan is None:
            return state
        state.prompt_token_ids = getattr(request.sampling_params, PROMPT, state.prompt_token_ids)
        return adopt(state, plan)

    return from_new_request


def _do_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Only called where tracing is on."""
    from nezha_vllm.frontend.answers import NezhaRequestState
    from nezha_vllm.frontend.tracing import describing, warn_of_no_statistics

    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(req_state, NezhaRequestState):
            original(self, engine_core_output, req_state, *args, **kwargs)
        elif req_state.stats is None:  # vLLM would stop at an assertion, and with it every request under way
            warn_of_no_statistics()
        else:
            with describing(req_state):
                original(self, engine_core_output, req_state, *args, **kwargs)

    return do_tracing


def _make_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM makes the handler once an API process, when everything else is there."""
    from nezha_vllm.frontend import metrics

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        service = service_of(self.model_config)
        if service is not None and getattr(self.engine_client, "log_stats", False):
            metrics.serve(service)

    return init


def _run_output_handler(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own background task of an API process; ours begin with it."""
    from nezha_vllm.frontend.follow import follow
    from nezha_vllm.frontend.remote import watch_remote_engines

    def run_output_handler(self: Any) -> None:
        begins = self.output_handler is None
        original(self)
        if begins:
            follow(self)
            watch_remote_engines(self)

    return run_output_handler


def _create_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what cannot work before a stream is opened, so that it is a 400 and not an event."""
    from vllm.exceptions import VLLMValidationError

    from nezha_vllm.frontend.checked_route import reached
    from nezha_vllm.frontend.completions import num_prompts, prepare
    from nezha_vllm.frontend.errors import unavailable
    from nezha_vllm.frontend.options import make_plan
    from nezha_vllm.frontend.short_way import admitted

    async def create_completion(self: Any, request: Any, raw_request: Any = None) -> Any:
        reached(raw_request)
        service = service_of(self.model_config)
        if service is None:
            return await original(self, request, raw_request)
        with one_request():  # whoever comes by no route of ours
            service = service_for_request(service)
            try:
                request = prepare(request, service)
                make_plan(service, request.to_sampling_params(1, {}))
            except (ValueError, VLLMValidationError) as error:
                return self.create_error_response(error)
            with admitted(raw_request, num_prompts(request.prompt)) as may:
                if not may:
                    return self.create_error_response(unavailable("too many requests"))
                return await original(self, request, raw_request)

    return create_completion


def _build_response(original: Callable[..., Any]) -> Callable[..., Any]:
    from nezha_vllm.frontend.completions import annotate_response

    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = original(self, final_res_batch, request, *args, **kwargs)
        return (
            response
            if service_of(self.model_config) is None
            else annotate_response(response, final_res_batch, request.n)
        )

    return request_output_to_completion_response


def _stream(original: Callable[..., Any]) -> Callable[..., Any]:
    from nezha_vllm.frontend.completions import annotate_stream

    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if service_of(self.model_config) is None:
            return original(self, request, engine_inputs, result_generator, *args, **kwargs)
        end_request()
        results: dict[int, Any] = {}

        async def recorded() -> Any:
            async for prompt, result in result_generator:
                results[prompt] = result
                yield prompt, result

        lines = original(self, request, engine_inputs, recorded(), *args, **kwargs)
        return annotate_stream(lines, results, request.n)

    return completion_stream_generator


def _refuse_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    from nezha_vllm.frontend.completions import CHAT_REFUSAL
    from nezha_vllm.frontend.errors import bad_request

    async def refuse(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        if service_of(self.model_config) is None:
            return await original(self, request, raw_request, *args, **kwargs)
        return self.create_error_response(bad_request("messages", CHAT_REFUSAL))

    return refuse


def _beam_search_offline(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LLM.beam_search`` with one prefill instead of a request per beam and token."""
    from nezha_vllm.frontend.offline import beam_search

    def beam_search_or_original(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if service_of(self.llm_engine.model_config) is None:
            return original(self, prompts, params, *args, **kwargs)
        return beam_search(self, prompts, params, *args, **kwargs)

    return beam_search_or_original
