"""Metrics of ours on vLLM's ``/metrics``: what counts as what, and that a real server counts it."""

from __future__ import annotations

import asyncio
import os
import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from nezha_vllm import payload
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.eligibility import Eligibility
from nezha_vllm.engine.stage_clock import StageClock
from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.answers import rank
from nezha_vllm.frontend.follow import Swap, tell
from nezha_vllm.frontend.options import Plan
from nezha_vllm.frontend.outcome import Outcome
from nezha_vllm.frontend.rules import Rules
from nezha_vllm.payload import RankedIds
from nezha_vllm.pointer import write_pointer
from nezha_vllm.store import Store

HISTORY = "<item:item-3><item:item-70>"
DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"


def start(status: int) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status}


def body(content: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


@pytest.mark.parametrize(
    ("messages", "outcome"),
    [
        ([start(200), body(b'{"choices": []}')], "answered"),
        ([start(200), body(b"data: {}\n\n", True), body(b"data: [DONE]\n\n", True), body(b"")], "answered"),
        ([start(200), body(b"data: {}\n\n", True)], "disconnected"),  # a stream that nobody reads to its end
        ([start(200), body(b"null")], "disconnected"),
        ([start(200), body(b'data: {"error": {}}\n\n', True), body(b"data: [DONE]\n\n", True), body(b"")], "failed"),
        ([start(400), body(b"{}")], "refused"),
        ([start(404), body(b"{}")], "refused"),
        ([start(429), body(b"{}")], "overloaded"),
        ([start(503), body(b"{}")], "overloaded"),
        ([start(500), body(b"{}")], "failed"),
        ([], "failed"),
    ],
)
def test_an_outcome_is_told_from_what_the_client_gets(messages: list[dict[str, Any]], outcome: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def respond() -> str:
        watched = Outcome(send)
        for message in messages:
            await watched(message)
        return watched.name

    assert asyncio.run(respond()) == outcome
    assert sent == messages
    assert outcome in metrics.OUTCOMES


@given(st.integers(0, 4096), st.floats(0, 1000))
def test_the_time_of_the_draft_stage_comes_with_the_answer(valid: int, seconds: float) -> None:
    host = payload.HostPayload(np.array([[9, 4]]), np.zeros((1, 3), np.float32), np.array([valid]))
    device = payload.Payload(*map(torch.from_numpy, host))
    for packed in (payload.with_seconds(host, seconds), payload.with_seconds(device, seconds)):
        found = payload.unpack(np.asarray(packed.token_ids[0]), np.asarray(packed.log_probs[0]), packed.ranks[0], 3)
        assert found.num_valid == valid
        assert found.draft_seconds == pytest.approx(seconds, abs=1e-6)


def test_on_a_cpu_the_clock_has_the_time_of_the_run_just_left() -> None:
    clock = StageClock(on_gpu=False)
    with clock:
        time.sleep(0.02)
    assert 0.02 <= clock.seconds < 1


@pytest.mark.gpu
def test_on_a_gpu_the_clock_waits_for_nothing_and_has_the_time_later() -> None:
    clock, cycles = StageClock(on_gpu=True), 200_000_000  # some 100 ms
    with clock:
        torch.cuda._sleep(cycles)
    started = time.perf_counter()
    with clock:
        torch.cuda._sleep(cycles)
    assert time.perf_counter() - started < 0.02
    assert clock.seconds == 0
    torch.cuda.synchronize()
    with clock:
        pass
    assert 0.02 < clock.seconds < 1


def answered(registry: CollectorRegistry, **of_rules: Any) -> None:
    plan: Any = SimpleNamespace(beam_width=64, rules=SimpleNamespace(**{"sizes": {}, "unknown": 0} | of_rules))
    ids = RankedIds(np.arange(3), np.zeros((3, 3)), num_drafted=64, num_valid=16, draft_seconds=0.003)
    answer: Any = SimpleNamespace(item_ids=["a", "b"], shortage="rules")
    metrics.Metrics(registry).record(plan, ids, answer)


@pytest.mark.parametrize(
    ("shortage", "rules", "validity", "scores"),
    [
        (None, {}, "stepwise", [-1, -2, -3, -4]),
        ("catalogue", {}, "stepwise", [-1, -2]),
        ("beams", {}, "final", [-1, -2]),
        ("min_score", {"min_score": -3}, "stepwise", [-1, -2, -5, -6]),
        ("rules", {"max_per_id": 1}, "stepwise", [-1, -2]),
        ("rules", {"eligible": Eligibility(True, np.array([0, 2]), np.array([0, 2], np.int32))}, "stepwise", [-1, -2]),
    ],
)
def test_a_short_answer_has_its_reason(
    shortage: str | None, rules: dict[str, Any], validity: str, scores: list[float]
) -> None:
    catalogue = Catalogue.build([f"i{row}" for row in range(5)], [[row, 0] for row in range(5)], [5, 1])
    service: Any = SimpleNamespace(catalogue=catalogue, settings=SimpleNamespace(shared_ids="expand"))
    plan = Plan(service, 3, 4, validity, False, Rules(**rules))
    index = np.array([0, 2, 1, 3])[: len(scores)]
    log_probs = np.stack([scores, np.zeros(len(scores))], axis=1)
    answer = rank(plan, RankedIds(index, log_probs, num_drafted=4, num_valid=len(scores)))
    assert answer.shortage == shortage
    assert (answer.summary.reason is None) == (len(answer.item_ids) == 3)


def test_an_answer_is_counted() -> None:
    registry = CollectorRegistry()
    answered(registry, sizes={"exclude_items": 700, "segments": 2}, unknown=5)
    for name, labels, value in (
        ("nezha_items_returned_sum", {}, 2),
        ("nezha_items_returned_bucket", {"le": "1.0"}, 0),
        ("nezha_items_returned_bucket", {"le": "5.0"}, 1),
        ("nezha_beam_width_sum", {}, 64),
        ("nezha_beams_drafted_total", {}, 64),
        ("nezha_beams_valid_total", {}, 16),
        ("nezha_draft_stage_seconds_sum", {}, 0.003),
        ("nezha_short_answers_total", {"reason": "rules"}, 1),
        ("nezha_short_answers_total", {"reason": "beams"}, 0),
        ("nezha_rule_size_sum", {"rule": "exclude_items"}, 700),
        ("nezha_rule_size_sum", {"rule": "segments"}, 2),
        ("nezha_rule_size_count", {"rule": "allow_items"}, 0),
        ("nezha_unknown_excluded_items_total", {}, 5),
    ):
        assert registry.get_sample_value(name, labels) == pytest.approx(value), name


def test_the_catalogue_shown_is_the_one_in_use(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    shown = metrics.Metrics(registry)
    for version, count in (("monday", 5), ("tuesday", 7)):
        codes = np.stack([np.arange(count) % 3, np.arange(count) // 3], axis=1)
        catalogue = Catalogue.build([f"i{row}" for row in range(count)], codes, [3, 3], version=version)
        catalogue.save(tmp_path / "catalogue")
        settings = SimpleNamespace(catalogue=tmp_path / "catalogue")
        shown.show_catalogue(SimpleNamespace(catalogue=catalogue, settings=settings))  # type: ignore[arg-type]
    assert registry.get_sample_value("nezha_catalogue_info", {"version": "monday"}) is None, "a series for ever"
    assert registry.get_sample_value("nezha_catalogue_info", {"version": "tuesday"}) == 1
    assert registry.get_sample_value("nezha_catalogue_items") == 7
    published = registry.get_sample_value("nezha_catalogue_published_timestamp_seconds")
    assert published == pytest.approx(time.time(), abs=60)


def test_a_refused_version_changes_no_age_of_the_one_that_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pointer, which knows when a rollback was, shows the refused version by then; files tell of a time before."""
    Catalogue.build(["a"], [[1, 2]], [3, 3], version="old").save(tmp_path / "catalogue")
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "catalogue")
    os.utime(store.folder / "versions" / "old" / "manifest.json", (0, 0))
    service = SimpleNamespace(catalogue=store.load(), settings=SimpleNamespace(catalogue=store.folder))
    registry = CollectorRegistry()
    shown = metrics.Metrics(registry)
    shown.show_catalogue(service)  # type: ignore[arg-type]
    monkeypatch.setattr(metrics, "active", lambda: shown)
    write_pointer(store.folder, replace(store.pointer(), version="bad", sequence=2))
    refused = Swap("refused", "bad", "old", 2, None, 0.1, "damaged")
    tell(refused, service, first=True)  # type: ignore[arg-type]
    published = registry.get_sample_value("nezha_catalogue_published_timestamp_seconds")
    assert published == pytest.approx(time.time(), abs=60)
    assert registry.get_sample_value("nezha_catalogue_swaps_total", {"result": "refused"}) == 1


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    registry = CollectorRegistry()
    metrics.Metrics(registry)
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    documented = set(re.findall(r"^\| `(nezha_\w+)`", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == exposed


def test_without_statistics_there_are_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from nezha_vllm.frontend import install

    served: list[object] = []
    monkeypatch.setattr(metrics, "serve", served.append)
    monkeypatch.setattr(install, "service_of", lambda model_config: model_config)

    def make(log_stats: bool, service: object) -> None:
        def original(self: Any, engine_client: object) -> None:
            self.engine_client, self.model_config = engine_client, service

        install._make_metrics(original)(SimpleNamespace(), SimpleNamespace(log_stats=log_stats))

    make(False, "a service")
    make(True, None)  # another model
    assert served == []
    make(True, "a service")
    assert served == ["a service"]


def scrape(server: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for sample in samples
        if sample.name.startswith("nezha_")
    }


@pytest.mark.slow
def test_a_server_counts_its_answers_and_why_some_are_short(server: str, checkpoint: Path) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60, max_retries=0)
    model = client.models.list().data[0].id

    def ask(n: int = 5, prompt: Any = HISTORY, stream: bool = False, **options: Any) -> None:
        answer = client.completions.create(
            model=model, prompt=prompt, n=n, stream=stream, extra_body={"vllm_xargs": options}
        )
        if stream:
            list(answer)

    before = scrape(server)
    ask()
    ask(prompt=[HISTORY, HISTORY], stream=True)
    ask(min_score=0)
    ask(n=20, beam_width=20, validity="final")
    ask(allow_items=["item-1", "item-2"])
    ask(exclude_items=["item-1", "no such item"], exclude_history=True, segments=["odd"])
    ask(n=500, beam_width=500)
    with pytest.raises(openai.BadRequestError):
        ask(n=60, beam_width=50)
    after = scrape(server)

    def more(name: str) -> float:
        return after[name] - before[name]

    assert more("nezha_requests_total|answered") == 7
    assert more("nezha_requests_total|refused") == 1
    assert more("nezha_requests_total|failed") == more("nezha_requests_total|disconnected") == 0
    short = {reason: more(f"nezha_short_answers_total|{reason}") for reason in metrics.SHORTAGES}
    assert short == {"min_score": 1, "beams": 1, "rules": 1, "catalogue": 0}
    assert more("nezha_request_seconds_count") == 7
    assert 0 < more("nezha_request_seconds_sum") < 60
    assert more("nezha_items_returned_count") == more("nezha_draft_stage_seconds_count") == 8
    assert more("nezha_beam_width_bucket|512.0") - more("nezha_beam_width_bucket|256.0") == 1
    assert 0 < more("nezha_draft_stage_seconds_sum") < 60
    assert 0 < more("nezha_beams_valid_total") < more("nezha_beams_drafted_total")
    assert more("nezha_rule_size_sum|exclude_items") == more("nezha_rule_size_sum|exclude_history") == 2
    assert more("nezha_rule_size_sum|segments") == 1
    assert more("nezha_unknown_excluded_items_total") == 1
    catalogue = Catalogue.load(checkpoint / "catalogue")
    assert after[f"nezha_catalogue_info|{catalogue.version}"] == 1
    assert after["nezha_catalogue_items"] == catalogue.num_items
    assert after["nezha_catalogue_semantic_ids"] == catalogue.num_ids
