"""Steps on the GPU: any size and mixture of widths through CUDA graphs, steps in flight, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nezha_vllm import payload
from nezha_vllm.draft_head import DraftHead, reference_beam_search

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SIZES, HIDDEN, WIDEST = (64, 64, 64), 256, 300
Step = tuple[list[int], list[int], torch.Tensor]


@pytest.fixture(scope="module")
def parts():
    from nezha_vllm.engine.draft_graphs import DraftGraphs
    from nezha_vllm.triton_search import Plan

    torch.manual_seed(0)
    head = DraftHead(HIDDEN, SIZES).requires_grad_(False).cuda()
    for parameter in head.parameters():
        parameter.normal_(std=HIDDEN**-0.5)
    keys = torch.randint(0, 64**3, (9000,), device="cuda").unique()
    return head, keys, DraftGraphs(Plan(head, keys), 96, WIDEST)


def make_step(rng: np.random.Generator, count: int) -> Step:
    """Widths, rows and states of a step whose requests lie anywhere in its tokens."""
    widths = [int(rng.choice([1, 10, 16, 17, 50, WIDEST])) for _ in range(count)]
    rows = np.cumsum(rng.integers(4, 9, count)) - 1
    return widths, rows.tolist(), torch.randn(int(rows[-1]) + 1, HIDDEN, device="cuda") * 2


def launch(graphs, step: Step):
    from nezha_vllm.engine.draft_graphs import Options

    widths, rows, states = step
    launches = graphs.launches(widths)
    graphs.stage(launches, rows, [Options(width, True) for width in widths])
    found, start = [], 0
    for one in launches:
        beams = graphs.run(one, states)
        found.append((one.rows, graphs.to_host(beams, start)))
        start += beams.numel()
    event = torch.cuda.Event()
    event.record()
    return event, found


def check(head, keys, step: Step, answers, n: int = 10) -> None:
    widths, rows, states = step
    got = payload.gather([(part, beams.numpy()) for part, beams in answers], len(widths), n, len(SIZES))
    hidden = torch.stack([states[row - len(SIZES) : row + 1] for row in rows])
    modes = torch.ones(len(widths), dtype=torch.bool, device="cuda")
    expected = reference_beam_search(head, hidden, keys, torch.tensor(widths, device="cuda"), modes)
    for request, width in enumerate(widths):
        found = payload.unpack(got.token_ids[request], got.log_probs[request], got.ranks[request], len(SIZES))
        kept = min(n, width)
        assert found.num_valid == found.num_drafted == int(expected.valid_N[request])
        scores = expected.scores_NK[request, :kept].cpu().numpy()
        assert np.allclose(found.log_probs.sum(1)[:kept], scores, atol=1e-4)
        assert found.index.tolist()[:1] == expected.index_NK[request, :1].tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 33, 96])
def test_any_batch_of_mixed_widths_equals_the_reference(parts, count):
    head, keys, graphs = parts
    step = make_step(np.random.default_rng(count), count)
    event, answers = launch(graphs, step)
    event.synchronize()
    check(head, keys, step, answers)


def test_steps_in_flight_keep_their_answers(parts):
    """Three steps are launched before the first is read: more than vLLM ever has in flight."""
    head, keys, graphs = parts
    steps = [make_step(np.random.default_rng(seed), 20 + seed) for seed in range(3)]
    pending = [launch(graphs, step) for step in steps]
    torch.cuda.synchronize()
    for step, (_, answers) in zip(steps, pending, strict=True):
        check(head, keys, step, answers)


def test_ten_thousand_requests_leave_no_memory_behind(parts):
    _, _, graphs = parts
    rng = np.random.default_rng(0)
    steps = [make_step(rng, 64) for _ in range(4)]

    def run(times: int) -> tuple[int, int]:
        for turn in range(times):
            event, _ = launch(graphs, steps[turn % 4])
            event.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = run(8)
    assert run(160) == before
