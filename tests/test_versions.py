"""What an engine does with generations: one after the other, two at most, each request in its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generations import Loaded, generation
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine import FinishReason

from nezha_vllm import payload
from nezha_vllm.beam import BeamSearch
from nezha_vllm.catalogue import CatalogueError, Keys
from nezha_vllm.draft_head import DraftHead
from nezha_vllm.engine import versions as engine_versions
from nezha_vllm.engine.draft_stage import DraftStage, Search
from nezha_vllm.engine.searched import Searched
from nezha_vllm.engine.stage_clock import StageClock
from nezha_vllm.engine.versions import BUSY, HELD, LOADED, LOADING, REFUSED, Versions
from nezha_vllm.frontend.answers import NezhaRequestState, _PayloadSink
from nezha_vllm.generation import FIRST, Generation
from nezha_vllm.semantic_id import SemanticIdCodec


def wait_for(versions: Versions, wanted: Generation) -> list[Any]:
    while (reply := versions.call("load", *wanted)) == [LOADING]:
        versions._reading.thread.join()
    return reply


def test_a_third_generation_waits_until_the_first_is_released_by_all() -> None:
    first = Loaded("first")
    versions = Versions(first, lambda wanted: Loaded(wanted.version))
    two, three = generation(2), generation(3)
    assert wait_for(versions, two) == [LOADED]
    assert [versions.call("hold", two.key, client) for client in (0, 1, 1)] == [[HELD, 1], [HELD, 2], [HELD, 2]]
    assert versions.call("load", *three) == [BUSY, list(two)]
    versions.call("release", FIRST, 0, 2)
    assert versions.find(FIRST) is first
    versions.call("release", FIRST, 1, 2)
    assert first.closed
    assert versions.find(FIRST) is None
    assert wait_for(versions, three) == [LOADED]


def test_what_is_being_read_comes_before_what_was_published_behind_it() -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    two, three = generation(2), generation(3)
    versions.call("load", *two)
    assert versions.call("load", *three) in ([BUSY, list(two)], [LOADING])
    assert wait_for(versions, two) == [LOADED]
    assert versions.call("load", *three) == [BUSY, list(two)]


def test_a_refusal_drops_the_generation_everywhere_and_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    two = generation(2)
    wait_for(versions, two)
    versions.call("hold", two.key, 0)
    versions.call("refuse", two.key, "no memory")
    assert versions.find(two.key) is None
    assert versions.call("hold", two.key, 0) == [REFUSED, "no memory"]
    assert versions.call("load", *two) == [REFUSED, "no memory"]
    monkeypatch.setattr(engine_versions.time, "monotonic", lambda: 1e12)
    assert wait_for(versions, two) == [LOADED]


def test_each_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    for wanted in (generation(2), generation(3)):
        versions.call("refuse", wanted.key, wanted.version)
    assert versions.call("load", *generation(2)) == [REFUSED, "v2"]
    assert versions.call("load", *generation(3)) == [REFUSED, "v3"]


def test_what_cannot_be_read_is_refused_with_the_reason() -> None:
    def fail(wanted: Generation) -> Loaded:
        raise CatalogueError("keys.safetensors is damaged")

    versions = Versions(Loaded("first"), fail)
    assert wait_for(versions, generation(2)) == [REFUSED, "keys.safetensors is damaged"]
    assert [loaded.version for loaded in versions] == ["first"]


def test_requests_of_two_generations_in_one_step_are_searched_each_in_its_own() -> None:
    torch.manual_seed(0)
    head = DraftHead(16, (8, 8, 8)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_()
    codec, rng = SemanticIdCodec((8, 8, 8)), np.random.default_rng(0)
    first, second = (np.sort(rng.choice(512, count, replace=False)) for count in (40, 300))
    search = BeamSearch(head, torch.from_numpy(first))
    one = Searched(search, Keys(codec, "one", first, None, None))
    two = Searched(search.over(torch.from_numpy(second)), Keys(codec, "two", second, None, None))
    stage: Any = DraftStage.__new__(DraftStage)
    stage.num_states, stage.graphs, stage.clock = 4, None, StageClock(on_gpu=False)
    stage.versions = Versions(one, lambda _: two)
    wanted = generation(2)
    wait_for(stage.versions, wanted)

    states = torch.randn(6, 4, 16)
    asked = [FIRST, wanted.key, None, "gone", wanted.key, FIRST]
    widths = [5, 20, 0, 7, 9, 30]
    searches = [
        None if key is None else Search(5, width, True, generation=key)
        for key, width in zip(asked, widths, strict=True)
    ]
    together = stage(states.flatten(0, 1), searches)
    for row, key in enumerate(asked):
        if key in (None, "gone"):
            assert (together.token_ids[row, 1:] == -1).all(), "nobody gets what nobody asked for"
            assert together.token_ids[row, 0] == (0 if key is None else payload.GONE)
            continue
        alone = stage(states[row], [searches[row]])
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()
        assert torch.allclose(together.log_probs[row], alone.log_probs[0])
        keys = torch.from_numpy(first if key == FIRST else second)
        reference = BeamSearch(head, keys)(states[row : row + 1], [widths[row]], [True])
        assert together.token_ids[row, 1:].tolist() == reference.index_NK[0, :5].tolist()

    only = stage(states[:1].flatten(0, 1), [Search(5, 5, True, generation="gone")])
    assert only.token_ids[0, 0] == payload.GONE


def test_a_request_on_a_generation_that_is_gone_is_told_to_come_again() -> None:
    state, sink = NezhaRequestState.__new__(NezhaRequestState), _PayloadSink()
    service = SimpleNamespace(num_levels=3, catalogue=SimpleNamespace(version="monday"))
    state.plan, state.logprobs_processor = SimpleNamespace(service=service), sink  # type: ignore[assignment]
    empty = payload.with_gone(payload.empty(1, torch.device("cpu")), [0])
    sink.payload = [part.numpy() for part in empty]
    error = state.make_request_output([0], None, FinishReason.LENGTH)
    assert create_error_response(error).error.code == 503
    assert "monday is gone from the engine" in str(error)
