"""What a request's span says of its search: vLLM makes the span where tracing is on, and these attributes join its own.

vLLM makes and ends the span in one call, behind the answer; a span processor is OpenTelemetry's own way into it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from nezha_vllm.frontend.answers import NezhaRequestState

logger = logging.getLogger("vllm.nezha")
_ATTRIBUTES: ContextVar[Mapping[str, Any] | None] = ContextVar("nezha_span_attributes", default=None)


def traces(vllm_config: VllmConfig) -> bool:
    """Whether the server makes spans of requests."""
    return vllm_config.observability_config.otlp_traces_endpoint is not None


@contextmanager
def describing(state: NezhaRequestState) -> Iterator[None]:
    """Spans that begin inside say what became of the request."""
    _watch()
    token = _ATTRIBUTES.set(attributes_of(state))
    try:
        yield
    finally:
        _ATTRIBUTES.reset(token)


def attributes_of(state: NezhaRequestState) -> dict[str, Any]:
    """Attributes of a request that has ended; ``docs/metrics.md`` says what each means."""
    plan = state.plan
    found: dict[str, Any] = {
        "nezha.n": plan.n,
        "nezha.beam_width": plan.beam_width,
        "nezha.validity": plan.validity,
        "nezha.catalogue_version": plan.service.catalogue.version,
        "nezha.outcome": "failed",
    }
    if state.answered is None:
        return found
    ids, answer = state.answered
    found |= {"nezha.outcome": "answered", "nezha.items_returned": len(answer.item_ids)}
    if ids.num_drafted:
        found["nezha.valid_share"] = ids.num_valid / ids.num_drafted
    if ids.draft_seconds:
        found["nezha.draft_stage_seconds"] = ids.draft_seconds
    if answer.shortage is not None:
        found["nezha.short_answer_reason"] = answer.shortage
    return found


@cache
def warn_of_no_statistics() -> None:
    logger.warning("NEZHA: --disable-log-stats leaves requests without times, and so without spans: leave it out")


@cache
def _watch() -> None:
    """Once a process, when its first span is due: OpenTelemetry is no requirement of ours, and vLLM has set it up."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

    class Describer(SpanProcessor):
        def on_start(self, span: Span, parent_context: Any = None) -> None:
            attributes = _ATTRIBUTES.get()
            if attributes is not None:
                span.set_attributes(attributes)

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.add_span_processor(Describer())
