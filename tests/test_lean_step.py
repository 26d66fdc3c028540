"""Lean steps on an NVIDIA GPU: the answers of vLLM's own steps on the same CUDA graphs, and proof they were lean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch
from answers import assert_same_answer, of_output
from conftest import BLOCK_SIZE, start
from test_engine import LENGTHS, N, ask, prompt_of

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

# up to what 32 prompts of up to 128 tokens have together
GRAPHS = {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]}
SAME = 3e-5  # on scores around 6: a batch of another size may have other matrix products; 1.8e-5 was seen
BATCHES = (1, 7, 32, 64, 256)
ASKED = [(1, "stepwise"), (7, "final"), (64, "stepwise"), (512, "final"), (512, "stepwise"), (10, "stepwise")]
MIXED = 84  # answers to compare: every combination 14 times
REQUESTS = 10_000
MIB = 1 << 20
MOST_LEAN = 32  # prompts that fit the largest graph together


def engine(checkpoint: Path, *, lean: bool, **options: object) -> LLM:
    settings = {
        "enforce_eager": False,
        "compilation_config": GRAPHS,
        "gpu_memory_utilization": 0.2,
        "max_num_seqs": 256,
        "additional_config": {"nezha": {"lean_step": lean}},
    }
    return start(checkpoint, **(settings | options))


def lean_steps(llm: LLM) -> int:
    return llm.collective_rpc("lean_steps")[0]


def stop(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()


def all_batches(llm: LLM, checkpoint: Path, size: int) -> list[RequestOutput]:
    """Every prompt length from 1 to 128, ``size`` prompts at once: long ones next to short ones."""
    lengths = [length for first in range(4) for length in LENGTHS[first::4]] * -(-size // len(LENGTHS))
    outputs: dict[int, RequestOutput] = {}
    for first in range(0, len(lengths), size):
        group = lengths[first : first + size]
        answers = ask(llm, [prompt_of(length, checkpoint) for length in group])
        outputs |= zip(group, answers, strict=True)
    return [outputs[length] for length in LENGTHS]


def assert_same(found: list[RequestOutput], expected: list[RequestOutput], tolerance: float = SAME) -> None:
    for output, other in zip(found, expected, strict=True):
        assert_same_answer(of_output(output), of_output(other), tolerance)


def mixed(llm: LLM, checkpoint: Path, size: int) -> list[RequestOutput]:
    """Widths, validity modes and lengths in one batch; the shapes of the first answers repeat in the later ones."""
    from vllm import SamplingParams

    lengths = [LENGTHS[37 * place % len(LENGTHS)] for place in range(max(size, MIXED))]
    params = [
        SamplingParams(n=min(N, width), extra_args={"beam_width": width, "validity": mode})
        for width, mode in islice(cycle(ASKED), len(lengths))
    ]
    outputs: list[RequestOutput] = []
    for first in range(0, len(lengths), size):
        prompts = [prompt_of(length, checkpoint) for length in lengths[first : first + size]]
        outputs += llm.generate(prompts, params[first : first + size], use_tqdm=False)
    return outputs


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """vLLM's own steps, each prompt alone: of one width, and of several."""
    llm = engine(checkpoint, lean=False, enable_prefix_caching=False)
    outputs = all_batches(llm, checkpoint, 1), mixed(llm, checkpoint, 1)
    assert lean_steps(llm) == 0
    stop(llm)
    return outputs


@pytest.fixture(scope="module")
def expected(plain: tuple[list[RequestOutput], list[RequestOutput]]) -> list[RequestOutput]:
    return plain[0]


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LLM]:
    llm = engine(checkpoint, lean=True, async_scheduling=request.param)
    yield llm
    stop(llm)


@pytest.mark.parametrize("size", BATCHES)
def test_every_prompt_length_gives_the_same_answer(
    llm: LLM, checkpoint: Path, expected: list[RequestOutput], size: int
) -> None:
    llm.reset_prefix_cache()
    before = lean_steps(llm)
    outputs = all_batches(llm, checkpoint, size)
    assert_same(outputs, expected)
    if size > MOST_LEAN:
        return
    assert all(output.num_cached_tokens == 0 for output in outputs)
    # a prompt that arrives while a step runs opens another step, so there may be more of them than batches
    assert lean_steps(llm) - before >= -(-len(LENGTHS) // size)


@pytest.mark.parametrize("size", [7, 64, 256])
def test_widths_modes_and_lengths_mix_in_a_batch(
    llm: LLM, checkpoint: Path, plain: tuple[list[RequestOutput], list[RequestOutput]], size: int
) -> None:
    llm.reset_prefix_cache()
    assert_same(mixed(llm, checkpoint, size)[:MIXED], plain[1])


def test_ten_thousand_requests_leave_no_memory_behind(llm: LLM, checkpoint: Path) -> None:
    def use(requests: int) -> tuple[int, list[int]]:
        for _ in range(requests // 256):
            mixed(llm, checkpoint, 256)
        free, total = torch.cuda.mem_get_info()
        here = psutil.Process()
        return total - free, [process.memory_info().rss for process in [here, *here.children(recursive=True)]]

    gpu_before, host_before = use(2 * 1024)
    gpu, host = use(REQUESTS)
    grown = np.subtract(host, host_before)
    print(f"\nGPU {gpu_before / MIB:.0f} to {gpu / MIB:.0f} MiB, processes by {grown / MIB} MiB")
    assert gpu <= gpu_before + 2 * MIB
    assert grown.max() <= 32 * MIB


def test_cached_prompts_give_the_same_answer(llm: LLM, checkpoint: Path, expected: list[RequestOutput]) -> None:
    llm.reset_prefix_cache()
    all_batches(llm, checkpoint, 32)
    before = lean_steps(llm)
    outputs = all_batches(llm, checkpoint, 1)
    assert_same(outputs, expected)
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= 3 * BLOCK_SIZE - 1
    assert lean_steps(llm) - before == len(LENGTHS)


def test_aborted_requests_disturb_nobody(llm: LLM, checkpoint: Path, expected: list[RequestOutput]) -> None:
    """Some are aborted while they wait, some while their step runs, some behind it."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    before = lean_steps(llm)
    for length in LENGTHS:
        doomed = [prompt_of(1 + (length + i) % len(LENGTHS), checkpoint) for i in range(3)]
        names = llm.enqueue(doomed, SamplingParams(n=N), use_tqdm=False)
        if length % 3:
            time.sleep(0.0005 * (length % 5))
        else:
            llm.llm_engine.step()
        llm.llm_engine.abort_request(names, internal=True)
        assert not llm.llm_engine.has_unfinished_requests()
        output = ask(llm, [prompt_of(length, checkpoint)])[0]
        assert_same([output], [expected[length - 1]])
    assert lean_steps(llm) - before >= len(LENGTHS)


def test_chunks_are_left_to_vllm_and_mix_with_lean_steps(checkpoint: Path, expected: list[RequestOutput]) -> None:
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    graphs = {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [8, 16, 24]}
    llm = engine(checkpoint, lean=True, compilation_config=graphs, **options)
    # every shape differs from the expected one's, so this is the tolerance between any two paths
    assert_same(all_batches(llm, checkpoint, 1), expected, 1e-4)
    alone = lean_steps(llm)
    assert 0 < alone < len(LENGTHS), "only prompts of up to 24 tokens, and cached ones, fit one step"
    assert_same(all_batches(llm, checkpoint, 32), expected, 1e-4)
    assert lean_steps(llm) > alone
    stop(llm)


def test_bfloat16_answers_do_not_change(checkpoint: Path) -> None:
    """FlashAttention 3, whose schedule is made anew for every step."""
    plain = engine(checkpoint, lean=False, dtype="bfloat16", enable_prefix_caching=False)
    expected = all_batches(plain, checkpoint, 1)
    stop(plain)
    llm = engine(checkpoint, lean=True, dtype="bfloat16", enable_prefix_caching=False)
    for size in BATCHES:
        before = lean_steps(llm)
        found = all_batches(llm, checkpoint, size)
        assert lean_steps(llm) > before
        shared = [
            len({item for item, _ in of_output(a)} & {item for item, _ in of_output(b)}) / N
            for a, b in zip(found, expected, strict=True)
        ]
        print(f"\nbfloat16, batches of {size}: {sum(shared) / len(shared):.3f} of the top {N} shared")
        assert sum(shared) / len(shared) > (0.999 if size == 1 else 0.95)
    stop(llm)
