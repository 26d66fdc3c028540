"""Steps on the GPU: any size and mixture of widths through CUDA graphs, steps in flight, bounded memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nezha_vllm import payload
from nezha_vllm.draft_head import DraftHead, Eligible, reference_beam_search

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed

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


def launch(graphs, step: Step, options=None):
    from nezha_vllm.engine.draft_graphs import Options

    widths, rows, states = step
    launches = graphs.launches(widths)
    graphs.stage(launches, rows, options or [Options(width, True) for width in widths])
    found, start = [], 0
    for one in launches:
        beams = graphs.run(one, states)
        found.append((one.rows, graphs.to_host(beams, start)))
        start += beams.numel()
    event = torch.cuda.Event()
    event.record()
    return event, found


def check(head, keys, step: Step, answers, n: int = 10, eligible=None) -> None:
    widths, rows, states = step
    got = payload.gather([(part, beams.numpy()) for part, beams in answers], len(widths), n, len(SIZES))
    check_payload(head, keys, widths, rows, states, got, n, eligible)


def check_payload(head, keys, widths, rows, states, got, n: int = 10, eligible=None, stepwise=None, items=None) -> None:
    hidden = torch.stack([states[row - len(SIZES) : row + 1] for row in rows])
    modes = torch.tensor(stepwise or [True] * len(widths), device="cuda")
    expected = reference_beam_search(
        head,
        hidden,
        keys,
        torch.tensor(widths, device="cuda"),
        modes,
        eligible=eligible,
        item_scores=items,
    )
    for request, width in enumerate(widths):
        found = payload.unpack(got.token_ids[request], got.log_probs[request], got.ranks[request], len(SIZES))
        assert found.num_valid == int(expected.valid_N[request])
        assert found.num_drafted == int(expected.drafted_N[request])
        kept = min(n, width, found.num_valid)
        scores = expected.scores_NK[request, :kept].cpu().numpy()
        assert np.allclose(found.log_probs.sum(1)[:kept], scores, atol=1e-4)
        assert found.index.tolist()[:1] == expected.index_NK[request, : min(1, kept)].tolist()


def options_of(widths, stepwise, eligible, places):
    """Of requests that may get all or all but some, each in the catalogue at its place."""
    from nezha_vllm.engine.draft_graphs import Options
    from nezha_vllm.triton_search import ALL, ALL_BUT

    return [
        Options(width, mode, ALL, place=place)
        if rule is None
        else Options(width, mode, ALL_BUT, rule.positions.cpu().numpy().astype(np.int32), place=place)
        for width, mode, rule, place in zip(widths, stepwise, eligible, places, strict=True)
    ]


def check_by_catalogue(head, catalogues, step: Step, answers, places, eligible, stepwise, items=None) -> None:
    """The requests of each catalogue, by its place, against the reference over it."""
    widths, rows, states = step
    got = payload.gather([(part, beams.numpy()) for part, beams in answers], len(widths), 10, len(SIZES))
    for place, keys in enumerate(catalogues):
        part = [request for request, where in enumerate(places) if where == place]
        check_payload(
            head,
            keys,
            [widths[request] for request in part],
            [rows[request] for request in part],
            states,
            payload.HostPayload(*(values[part] for values in got)),
            eligible=[eligible[request] for request in part],
            stepwise=[stepwise[request] for request in part],
            items=items,
        )


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


def test_combinations_of_segments_are_replaced_behind_the_steps_that_read_them(parts, monkeypatch):
    """Two places for four combinations, three steps in flight, and an exclusion list on one request of each step."""
    from nezha_vllm import segment_ranks
    from nezha_vllm.engine.draft_graphs import DraftGraphs, Options
    from nezha_vllm.triton_search import ALL_BUT, Plan

    monkeypatch.setattr(segment_ranks, "MAX_COMBINATIONS", 2)
    head, keys, _ = parts
    rng = np.random.default_rng(0)
    bits = [np.packbits(rng.random(len(keys)) < share, bitorder="little") for share in (0.5, 0.1, 0.9)]
    segments = segment_ranks.SegmentRanks(bits, np.arange(len(keys) + 1), "cuda")
    graphs = DraftGraphs(Plan(head, keys), 8, 64, segments.ranks)
    combinations = [((0,), ()), ((1,), (0,)), ((), (2,)), ((0, 2), ())]
    for first in range(0, 12, 3):
        pending = []
        for turn in range(first, first + 3):
            segments.new_step()
            options, eligible = [], []
            for place in range(2):
                combination = combinations[(turn + place) % 4]
                ranks = segments.combine(combination, torch.empty_like(segments.ranks[: len(keys) + 1]))
                listed = (ranks[1:] > ranks[:-1]).nonzero().flatten()[:: 2 + turn] if place else ranks[:0].long()
                at = segments.place(combination)
                options.append(Options(50, True, ALL_BUT, listed.cpu().numpy().astype(np.int32), at))
                eligible.append(Eligible(listed, False, ranks))
            step = [50, 50], [5, 11], torch.randn(12, HIDDEN, device="cuda") * 2
            pending.append((step, eligible, launch(graphs, step, options)))
        torch.cuda.synchronize()
        for step, eligible, (_, answers) in pending:
            check(head, keys, step, answers, eligible=eligible)


def test_graphs_search_in_catalogues_that_come_later(parts):
    """Requests of two in every step, while others take the place of the one before; no graph is captured again."""
    from nezha_vllm.engine.draft_graphs import DraftGraphs, Options
    from nezha_vllm.triton_search import Plan

    head, keys, _ = parts
    plan = Plan(head, keys)
    graphs = DraftGraphs(plan, 16, 64)
    captured = dict(graphs.graphs)
    before = 0
    living = {0: (plan, keys)}
    for turn in range(6):
        others = torch.randint(0, 64**3, (500 + 7000 * (turn % 3),), device="cuda").unique()
        other = plan.over(others)
        assert set(living) == {0} or set(living) == {1}
        place = graphs.put(other, None)
        living[place] = other, others
        pending = []
        for seed in range(3):  # in flight together
            rng = np.random.default_rng(10 * turn + seed)
            widths, rows, states = make_step(rng, 16)
            widths = [min(width, 64) for width in widths]
            places = rng.integers(0, 2, 16).tolist()
            options = [Options(width, True, place=at) for width, at in zip(widths, places, strict=True)]
            pending.append(((widths, rows, states), places, launch(graphs, (widths, rows, states), options)))
        gone = next(at for at in living if at != place)
        graphs.take_away(gone)  # waits for the steps
        for (widths, rows, states), places, (_, answers) in pending:
            got = payload.gather([(part, beams.numpy()) for part, beams in answers], 16, 10, len(SIZES))
            for at, (_, its_keys) in living.items():
                part = [row for row, where in enumerate(places) if where == at]
                picked = payload.HostPayload(*(values[part] for values in got))
                check_payload(
                    head, its_keys, [widths[row] for row in part], [rows[row] for row in part], states, picked
                )
        del living[gone], other, others
        torch.cuda.synchronize()
        if turn == 2:
            before = torch.cuda.memory_allocated()
    assert graphs.graphs == captured
    assert torch.cuda.memory_allocated() < before + (1 << 19), "arrays of a catalogue that is gone are given back"


def test_a_softmax_over_the_catalogue_is_over_the_one_that_a_request_is_searched_in(parts):
    """Two catalogues, both modes and exclusion lists in one step."""
    from nezha_vllm.engine.draft_graphs import DraftGraphs
    from nezha_vllm.triton_search import Plan

    head = copy.copy(parts[0])
    head.over_catalogue = True
    catalogues = [torch.randint(0, 64**3, (count,), device="cuda").unique() for count in (200_000, 3000)]
    plan = Plan(head, catalogues[0])
    graphs = DraftGraphs(plan, 16, 64)
    assert graphs.put(plan.over(catalogues[1]), None) == 1
    rng = np.random.default_rng(0)
    widths, rows, states = make_step(rng, 16)
    widths = [min(width, 64) for width in widths]
    places, stepwise = rng.integers(0, 2, 16).tolist(), [request % 3 > 0 for request in range(16)]
    eligible: list[Eligible | None] = []
    for request, place in enumerate(places):
        best = reference_beam_search(
            head,
            states[None, rows[request] - len(SIZES) : rows[request] + 1],
            catalogues[place],
            torch.tensor([20], device="cuda"),
            torch.tensor([True], device="cuda"),
        )
        eligible.append(None if request % 2 else Eligible(best.index_NK[0, ::2].sort().values, only=False))
    step = widths, rows, states
    event, answers = launch(graphs, step, options_of(widths, stepwise, eligible, places))
    event.synchronize()
    check_by_catalogue(head, catalogues, step, answers, places, eligible, stepwise)


def test_item_scores_are_the_models_in_every_catalogue(parts):
    """Two catalogues, both modes and exclusion lists in one step, three steps in flight; the model knows some items."""
    from benchmarks.search_case import random_items
    from nezha_vllm.engine.draft_graphs import DraftGraphs
    from nezha_vllm.triton_search import Plan

    head, keys, _ = parts
    catalogues = [keys, torch.randint(0, 64**3, (30_000,), device="cuda").unique()]
    items = random_items(head, catalogues[1][::2])
    plan = Plan(head, keys, items)
    graphs = DraftGraphs(plan, 32, WIDEST)
    assert graphs.put(plan.over(catalogues[1]), None) == 1
    rng = np.random.default_rng(0)
    pending = []
    for seed in range(3):
        step = make_step(np.random.default_rng(seed), 20)
        places, stepwise = rng.integers(0, 2, 20).tolist(), (rng.random(20) < 0.7).tolist()
        eligible: list[Eligible | None] = [
            Eligible(torch.arange(0, 9000, 3, device="cuda")[:2000], only=False) if request % 2 else None
            for request in range(20)
        ]
        options = options_of(step[0], stepwise, eligible, places)
        pending.append((step, places, stepwise, eligible, launch(graphs, step, options)))
    torch.cuda.synchronize()
    for step, places, stepwise, eligible, (_, answers) in pending:
        check_by_catalogue(head, catalogues, step, answers, places, eligible, stepwise, items)


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
