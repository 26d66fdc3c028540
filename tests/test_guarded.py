"""A server with an API key and with tracing: what the key guards, and what spans of requests say."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import serving

from nezha_vllm.catalogue import Catalogue

KEY = "a key of this test"
HISTORY = "<item:item-3><item:item-70>"
LONG_WAY = {"X-Session-ID": "any"}
# say nothing of items
OPEN = {"/health", "/ping", "/metrics", "/version", "/load", "/kv_event_sources", "/is_scaling_elastic_ep"}


class Collector:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        import grpc
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

        collected = self.spans = []

        class Service(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                for resource in request.resource_spans:
                    collected.extend(span for scope in resource.scope_spans for span in scope.spans)
                return trace_service_pb2.ExportTraceServiceResponse()

        self.server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), self.server)
        self.url = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def requests(self, count: int) -> list[Any]:
        """The first spans of requests, once there are so many."""
        deadline = time.monotonic() + 20
        while True:
            found = [span for span in self.spans if span.name == "llm_request"]
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.stop(None)


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("guarded") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds between two exports, 5,000 by default
        with serving(checkpoint, log, "--api-key", KEY, "--otlp-traces-endpoint", collector.url) as running:
            running.wait_until_ready(timeout=240)
            yield running.url


def post(server: str, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{server}{path}", json.dumps(body).encode(), method="POST")
    for name, value in ({"Content-Type": "application/json"} | headers).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or "{}")


def ask(server: str, key: str | None = KEY, path: str = "/v1/completions", **given: Any) -> tuple[int, dict[str, Any]]:
    headers = given.pop("headers", {}) | ({} if key is None else {"Authorization": f"Bearer {key}"})
    return post(server, path, {"prompt": HISTORY, "n": 5} | given, **headers)


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, LONG_WAY], ids=["short way", "vLLM's handler"])
@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_items_are_for_those_who_have_the_key(guarded: str, path: str, headers: dict[str, str]) -> None:
    for key in (None, "", "another", KEY[:-1], KEY + " "):
        status, answer = ask(guarded, key, path, headers=headers)
        assert (status, answer) == (401, {"error": "Unauthorized"})
    status, answer = ask(guarded, path=path, headers=headers)
    assert status == 200
    assert len(answer["choices"]) == 5


@pytest.mark.slow
def test_no_route_that_knows_items_answers_without_the_key(guarded: str) -> None:
    routes = json.loads(urllib.request.urlopen(f"{guarded}/openapi.json").read())["paths"]
    asked = {path for path in routes if path not in OPEN}
    assert {"/v1/completions", "/v1/models", "/invocations", "/tokenize", "/scale_elastic_ep"} <= asked
    for path in asked:
        for method in routes[path]:
            request = urllib.request.Request(f"{guarded}{path}", b"{}" if method == "post" else None)
            request.add_header("Content-Type", "application/json")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)


@pytest.mark.slow
def test_spans_of_requests_say_what_became_of_the_search(guarded: str, collector: Collector, checkpoint: Path) -> None:
    version = Catalogue.load(checkpoint / "catalogue").version
    wide = {"vllm_xargs": {"beam_width": 64}}
    tight = {"n": 20, "vllm_xargs": {"beam_width": 20, "validity": "final"}}
    trace = f"{'ab' * 16}"
    traced = {"traceparent": f"00-{trace}-{'cd' * 8}-01"}
    before = len(collector.requests(0))
    for headers in (traced, traced | LONG_WAY):
        assert ask(guarded, headers=headers, **wide)[0] == 200
        assert ask(guarded, headers=headers, **tight)[0] == 200
    assert ask(guarded, n=60)[0] == 400
    spans = collector.requests(before + 4)[before:]
    assert len(spans) == 4, "a request that is refused never comes to the engine"
    for span in spans:
        assert span.trace_id.hex() == trace
        found = attributes(span)
        assert found["gen_ai.usage.prompt_tokens"] == 9, "vLLM's own are still there"
        assert found["nezha.outcome"] == "answered"
        assert found["nezha.catalogue_version"] == version
        assert 0 < found["nezha.draft_stage_seconds"] < 60
    by_width = sorted(map(attributes, spans), key=lambda found: found["nezha.beam_width"])
    for found in by_width[:2]:
        assert (found["nezha.beam_width"], found["nezha.n"], found["nezha.validity"]) == (20, 20, "final")
        assert found["nezha.items_returned"] < 20
        assert found["nezha.short_answer_reason"] == "beams"
        assert 0 <= found["nezha.valid_share"] < 1
    for found in by_width[2:]:
        assert (found["nezha.beam_width"], found["nezha.n"], found["nezha.validity"]) == (64, 5, "stepwise")
        assert found["nezha.items_returned"] == 5
        assert found["nezha.valid_share"] == 1
        assert "nezha.short_answer_reason" not in found


def test_a_request_without_an_answer_has_failed() -> None:
    from nezha_vllm.frontend.tracing import attributes_of

    plan = SimpleNamespace(
        n=3, beam_width=8, validity="final", service=SimpleNamespace(catalogue=SimpleNamespace(version="v"))
    )
    found = attributes_of(SimpleNamespace(plan=plan, answered=None))  # type: ignore[arg-type]
    assert found["nezha.outcome"] == "failed"
    assert "nezha.items_returned" not in found


def test_without_statistics_a_request_has_no_span_and_the_next_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own way makes a span of times that are not there, and ends in an assertion."""
    from nezha_vllm.frontend import tracing
    from nezha_vllm.frontend.answers import NezhaRequestState
    from nezha_vllm.frontend.install import _do_tracing

    def original(*_: Any) -> None:
        raise AssertionError("not to be called")

    told: list[str] = []
    monkeypatch.setattr(tracing.logger, "warning", told.append)
    tracing.warn_of_no_statistics.cache_clear()
    state = NezhaRequestState.__new__(NezhaRequestState)
    state.stats = None
    for _ in range(2):
        _do_tracing(original)(None, None, state, None)
    assert len(told) == 1
    assert "--disable-log-stats" in told[0]
