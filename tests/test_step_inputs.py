"""The packed plan of a lean step arrives as a plain loop would write it, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; tests/test_interpreted.py runs these in Triton's interpreter", allow_module_level=True)

if DEVICE == "cpu":  # in a process of its own; what writes a plan takes nothing of this, and it imports vLLM for 10 s
    sys.modules["nezha_vllm.engine.draft_stage"] = SimpleNamespace(Search=None)  # type: ignore[assignment]

from nezha_vllm.engine import step_plan  # noqa: E402
from nezha_vllm.kernels import step_inputs  # noqa: E402

PAD_SLOT = -1
STATES = 4


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_writes_what_a_plain_loop_does(seed: int) -> None:
    assert step_inputs.PLAN_FIELDS == step_plan.PLAN_FIELDS
    compare(np.random.default_rng(seed), block=16 if seed % 2 else 48, longest=3000 if seed % 10 == 0 else 90)


def plain_loop(batch: Any, buffers: list[np.ndarray], padded_requests: int, padded_tokens: int, block: int) -> None:
    input_ids, positions, query_start, seq_lens, block_table, slots = buffers
    token = 0
    query_start[0] = 0
    for row in range(padded_requests):
        real = row < len(batch.req_ids)
        seq_lens[row] = batch.computed[row] + len(batch.tokens[row]) if real else 0
        if real:
            block_table[row, : len(batch.blocks[row])] = batch.blocks[row]
            for offset, token_id in enumerate(batch.tokens[row]):
                position = batch.computed[row] + offset
                input_ids[token], positions[token] = token_id, position
                slots[token] = batch.blocks[row][position // block] * block + position % block
                token += 1
        else:
            block_table[row] = 0
        query_start[row + 1] = token
    for rest in (input_ids, positions):
        rest[token:padded_tokens] = 0
    slots[token:padded_tokens] = PAD_SLOT


def compare(rng: np.random.Generator, block: int, longest: int) -> None:
    count = int(rng.integers(0, 5))
    lengths = rng.integers(STATES, longest, count).tolist()
    computed = (rng.integers(0, 3, count) * block).tolist()
    tokens = [rng.integers(0, 1 << 17, length).tolist() for length in lengths]
    needed = [-(-(c + n) // block) for c, n in zip(computed, lengths, strict=True)]
    blocks = [rng.integers(1, 1 << 20, n).tolist() for n in needed]
    batch = step_plan.LeanBatch([str(i) for i in range(count)], [], tokens, computed, blocks, sum(lengths))

    requests = count + int(rng.integers(0, 3)) or 1
    padded = max(1, batch.num_tokens + int(rng.integers(0, 40)))
    shapes = [(padded + 3, np.int32), (padded + 3, np.int64), (requests + 2, np.int32), (requests + 1, np.int32)]
    shapes += [((requests + 1, max(needed, default=0) + 2), np.int32), (padded + 3, np.int64)]
    expected = [np.full(shape, 7, dtype) for shape, dtype in shapes]  # 7: what a step before left there
    found = [torch.from_numpy(buffer.copy()).to(DEVICE) for buffer in expected]
    plan = rng.integers(0, 9, batch.num_words + 5).astype(np.int32)
    step_plan.write_plan(plan, batch)
    step_inputs.fill_step_inputs(
        torch.from_numpy(plan).to(DEVICE),
        step_inputs.StepInputs(*found),
        num_requests=count,
        num_tokens=batch.num_tokens,
        padded_requests=requests,
        padded_tokens=padded,
        block_size=block,
    )
    plain_loop(batch, expected, requests, padded, block)
    for name, tensor, array in zip(step_inputs.StepInputs._fields, found, expected, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, err_msg=name)
