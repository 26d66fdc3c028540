"""The reference beam search: equal to a plain loop over prefixes, and to brute force where the beam is wide enough.

Heads are float64 with a handful of hidden units and round to float32 before the softmax, so that matrix products of
different shapes agree after rounding: batched and single searches must then be *exactly* equal, ties included.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import Answer, plain_search
from strategies import key_sets, small_codebooks
from torch import Tensor

from nezha_vllm import beam
from nezha_vllm.draft_head import Beams, DraftHead, Eligible, reference_beam_search
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.semantic_id import SemanticIdCodec


@dataclass
class Case:
    head: DraftHead
    keys: np.ndarray
    hidden_NSH: Tensor
    widths: list[int]
    stepwise: list[bool]

    def search(
        self, eligible: list[Eligible | None] | None = None, item_scores: ItemScores | None = None, **changes
    ) -> Beams:
        case = Case(**(vars(self) | changes))
        return reference_beam_search(
            case.head,
            case.hidden_NSH,
            torch.from_numpy(case.keys),
            torch.tensor(case.widths),
            torch.tensor(case.stepwise),
            eligible=eligible,
            item_scores=item_scores,
        )


def make_head(kind: str, sizes: tuple[int, ...], hidden_size: int, seed: int) -> DraftHead:
    """``random``; ``flat``: every code of a level equally likely; ``twins``: neighbouring codes indistinguishable."""
    torch.manual_seed(seed)
    head = DraftHead(hidden_size, sizes, dtype=torch.float64).requires_grad_(False)
    for weight in head.parameters():
        weight.normal_(std=0 if kind == "flat" else 1)
    if kind == "twins":
        for table in [*head.logit_heads, *head.code_embeddings]:
            table.weight.copy_(table.weight[torch.arange(len(table.weight)) // 2 * 2])
    return head


@st.composite
def cases(draw: st.DrawFn, max_keys: int = 3000, max_levels: int = 5) -> Case:
    sizes = draw(small_codebooks(max_levels=max_levels, max_size=12))
    seed = draw(st.integers(0, 2**32 - 1))
    head = make_head(draw(st.sampled_from(["random", "flat", "twins"])), sizes, draw(st.integers(1, 6)), seed)
    head.over_catalogue = draw(st.booleans())
    count = draw(st.integers(1, 4))
    around = [size + step for size in sizes for step in (-1, 0, 1) if size + step >= 1]
    return Case(
        head,
        draw(key_sets(sizes, max_keys)),
        torch.randn(count, len(sizes) + 1, head.logit_heads[0].in_features, dtype=torch.float64),
        [draw(st.sampled_from(around) | st.integers(1, 40)) for _ in range(count)],
        [draw(st.booleans()) for _ in range(count)],
    )


@st.composite
def item_scores_of(draw: st.DrawFn, case: Case) -> ItemScores:
    """Of a model that has tokens of some of the catalogue's items, and of others."""
    codec = SemanticIdCodec(case.head.codebook_sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    known = case.keys[rng.random(len(case.keys)) < draw(st.sampled_from([0, 0.5, 1]))]
    known = np.union1d(known, rng.integers(0, codec.capacity, 3))
    offsets = 7 + np.cumsum((0, *codec.codebook_sizes[:-1]))
    tokens = ItemTokens(known, 9 + sum(codec.codebook_sizes), codec, offsets.tolist())
    shape = tokens.first + len(known), case.hidden_NSH.shape[2]
    return ItemScores(tokens, torch.from_numpy(rng.standard_normal(shape)), draw(st.sampled_from([0.25, 1.0, 3.0])))


def products(scores: ItemScores, hidden_SH: Tensor, keys: np.ndarray) -> Tensor:
    """weight · (h_0 · vector) of each key, one after the other [M]; rows of codes are from 7 on."""
    tokens = {key: scores.embeddings[scores.first + number] for number, key in enumerate(scores.keys.tolist())}
    offsets = 7 + np.cumsum((0, *scores.codec.codebook_sizes[:-1]))

    def of_codes(key: int) -> tuple[int, Tensor]:
        codes = scores.codec.codes_of_key(np.array([key]))[0]
        return int(codes[0]), scores.embeddings[torch.from_numpy(offsets + codes)].sum(0)

    beyond: dict[int, list[Tensor]] = {}
    for key, vector in tokens.items():
        first, codes = of_codes(key)
        beyond.setdefault(first, []).append(vector - codes)
    found = []
    for key in keys.tolist():
        first, codes = of_codes(key)
        added = torch.stack(beyond[first]).mean(0) if first in beyond else 0
        found.append(scores.weight * torch.dot(hidden_SH[0], tokens.get(key, codes + added)))
    return torch.stack(found).float()


def answer(beams: Beams, request: int) -> Answer:
    valid = int(beams.valid_N[request])
    assert (beams.index_NK[request, valid:] == -1).all()
    assert (beams.scores_NK[request, valid:] == -torch.inf).all()
    return Answer(
        beams.index_NK[request, :valid].tolist(),
        beams.scores_NK[request, :valid].tolist(),
        beams.log_probs_NKL[request, :valid].tolist(),
        int(beams.drafted_N[request]),
    )


def brute_force(head: DraftHead, hidden_SH: Tensor, keys: np.ndarray) -> Tensor:
    """Teacher-forced scores of every semantic ID of the catalogue [M], float32."""
    codes_ML = torch.from_numpy(SemanticIdCodec(head.codebook_sizes).codes_of_key(keys))
    levels = head(hidden_SH.expand(len(keys), -1, -1), codes_ML)
    if head.over_catalogue:
        levels = [shares_among_items(log_p_MT, codes_ML, level) for level, log_p_MT in enumerate(levels)]
    return sum(log_p.gather(1, codes_ML[:, level, None])[:, 0] for level, log_p in enumerate(levels))


def shares_among_items(log_p_MT: Tensor, codes_ML: Tensor, level: int) -> Tensor:
    """Each item's probabilities of a level, divided by the sum of those that continue its prefix to an item."""
    items = codes_ML.tolist()
    follow: dict[tuple[int, ...], set[int]] = {}
    for item in items:
        follow.setdefault(tuple(item[:level]), set()).add(item[level])
    shares_MT = torch.zeros_like(log_p_MT)
    for row, item in enumerate(items):
        codes = sorted(follow[tuple(item[:level])])
        p = (log_p_MT[row, codes] - log_p_MT[row, codes].max()).exp()
        shares_MT[row, codes] = p / p.sum()
    return shares_MT.log()


def assert_best_of(scores_M: Tensor, found: Answer, tolerance: float) -> None:
    """``found`` is the whole catalogue in the order of ``scores_M``; equal scores by semantic ID."""
    assert sorted(found.index) == list(range(len(scores_M)))
    assert found.scores == pytest.approx(scores_M[found.index].tolist(), abs=tolerance)
    pairs = list(zip(found.scores, found.index, strict=True))
    assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    in_truth = scores_M[found.index]
    assert (in_truth[:-1] - in_truth[1:] >= -2 * tolerance).all()


@settings(max_examples=300)
@given(cases())
def test_a_batch_equals_a_plain_loop_over_prefixes(case):
    beams = case.search()
    for request, (width, stepwise) in enumerate(zip(case.widths, case.stepwise, strict=True)):
        expected = plain_search(case.head, case.hidden_NSH[request], case.keys, width, stepwise)
        assert answer(beams, request) == expected


@given(cases(max_keys=200), st.integers(0, 50))
def test_a_beam_as_wide_as_the_catalogue_is_brute_force(case, beyond):
    width = len(case.keys) + beyond
    beams = case.search(widths=[width] * len(case.widths), stepwise=[True] * len(case.widths))
    for request in range(len(case.widths)):
        found = answer(beams, request)
        assert len(found.index) == found.drafted == len(case.keys)
        assert_best_of(brute_force(case.head, case.hidden_NSH[request], case.keys), found, tolerance=1e-5)


@given(st.data(), st.integers(0, 50))
def test_a_beam_as_wide_as_the_catalogue_is_brute_force_with_item_scores(data, beyond):
    case = data.draw(cases(max_keys=200))
    scores, widths = data.draw(item_scores_of(case)), [len(case.keys) + beyond] * len(case.widths)
    beams = case.search(item_scores=scores, widths=widths, stepwise=[True] * len(widths))
    for request, hidden_SH in enumerate(case.hidden_NSH):
        totals_M = brute_force(case.head, hidden_SH, case.keys) + products(scores, hidden_SH, case.keys)
        assert_best_of(totals_M, answer(beams, request), tolerance=1e-4)


@given(st.data())
def test_item_scores_put_what_was_found_in_another_order(data):
    """Whatever the width, mode and rule: the same items, whose last log-probability has the product in it."""
    case = data.draw(cases())
    scores = data.draw(item_scores_of(case))
    listed = torch.arange(0, len(case.keys), 2)
    rules = [data.draw(st.sampled_from([None, Eligible(listed, True), Eligible(listed, False)])) for _ in case.widths]
    plain, beams = case.search(rules), case.search(rules, scores)
    for request, hidden_SH in enumerate(case.hidden_NSH):
        before, after = answer(plain, request), answer(beams, request)
        assert sorted(after.index) == sorted(before.index)
        assert after.drafted == before.drafted
        if not after.index:
            continue
        pairs = list(zip(after.scores, after.index, strict=True))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        log_probs = dict(zip(before.index, before.log_probs, strict=True))
        added = np.array(after.log_probs) - np.array([log_probs[index] for index in after.index])
        assert (added[:, :-1] == 0).all()
        expected = products(scores, hidden_SH, case.keys[after.index]).tolist()
        assert added[:, -1].tolist() == pytest.approx(expected, abs=1e-4)


@given(cases(max_keys=200))
def test_with_a_softmax_over_the_catalogue_the_items_probabilities_sum_to_one(case):
    case.head.over_catalogue = True
    codes_ML = SemanticIdCodec(case.head.codebook_sizes).codes_of_key(case.keys)
    prefixes = [Counter(map(tuple, codes_ML[:, :level].tolist())) for level in range(case.head.num_levels)]
    beams = case.search(widths=[len(case.keys)] * len(case.widths), stepwise=[True] * len(case.widths))
    for request in range(len(case.widths)):
        found = answer(beams, request)
        assert np.exp(found.scores).sum() == pytest.approx(1, abs=1e-4)
        for index, log_probs in zip(found.index, found.log_probs, strict=True):
            for level, log_prob in enumerate(log_probs):
                left = prefixes[level][tuple(codes_ML[index, :level].tolist())]
                assert left > 1 or log_prob == 0, "one item is left, and is certain"


@given(cases(max_levels=3))
def test_final_mode_is_unconstrained_search_then_dropping(case):
    """Whatever the softmax of a stepwise search: that of `final` is over all codes."""
    final = case.search(stepwise=[False] * len(case.widths))
    case.head.over_catalogue = False
    everything = np.arange(SemanticIdCodec(case.head.codebook_sizes).capacity)
    free = case.search(keys=everything, stepwise=[True] * len(case.widths))
    position = {key: index for index, key in enumerate(case.keys.tolist())}
    for request in range(len(case.widths)):
        drafts = answer(free, request)
        kept = [rank for rank, key in enumerate(drafts.index) if key in position]
        assert answer(final, request) == Answer(
            [position[drafts.index[rank]] for rank in kept],
            [drafts.scores[rank] for rank in kept],
            [drafts.log_probs[rank] for rank in kept],
            len(drafts.index),
        )


@given(cases())
def test_a_request_alone_gets_what_it_gets_in_a_batch(case):
    together = case.search()
    for n in range(len(case.widths)):
        alone = case.search(hidden_NSH=case.hidden_NSH[n : n + 1], widths=[case.widths[n]], stepwise=[case.stepwise[n]])
        assert answer(alone, 0) == answer(together, n)


@given(cases())
def test_stepwise_fills_the_beam_whenever_the_catalogue_can(case):
    beams = case.search(stepwise=[True] * len(case.widths))
    assert beams.valid_N.tolist() == beams.drafted_N.tolist()
    assert beams.valid_N.tolist() == [min(width, len(case.keys)) for width in case.widths]
    for request in range(len(case.widths)):
        found = answer(beams, request)
        assert len(set(found.index)) == len(found.index)
        assert found.scores == pytest.approx(np.sum(found.log_probs, axis=1), abs=1e-5)


@given(cases())
def test_tables_made_at_load_change_nothing(case):
    arguments = torch.from_numpy(case.keys), torch.tensor(case.widths), torch.tensor(case.stepwise)
    beams = reference_beam_search(case.head, case.hidden_NSH, *arguments, case.head.code_drives())
    for request in range(len(case.widths)):
        assert answer(beams, request) == answer(case.search(), request)


@given(cases(), st.sampled_from([1, 200, 1 << 26]))
def test_a_batch_searched_in_slices_gets_the_same(case, most_scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam, "MAX_SCORES", most_scores)
        sliced = beam.BeamSearch(case.head, torch.from_numpy(case.keys))(case.hidden_NSH, case.widths, case.stepwise)
    for request in range(len(case.widths)):
        assert answer(sliced, request) == answer(case.search(), request)


@pytest.mark.parametrize("width", [1, 5, 31])
def test_equal_scores_come_in_order_of_semantic_id(width):
    head = make_head("flat", (3, 4, 5), 2, seed=0)
    keys = np.arange(0, 60, 2)
    beams = Case(head, keys, torch.zeros(1, 4, 2, dtype=torch.float64), [width], [True]).search()
    assert answer(beams, 0).index == list(range(min(width, 30)))


def test_a_request_without_numbers_gets_nothing_and_disturbs_nobody():
    head = make_head("random", (5, 5), 4, seed=0)
    hidden = torch.randn(3, 3, 4, dtype=torch.float64)
    case = Case(head, np.arange(0, 25, 3), hidden, [4, 4, 4], [True, True, False])
    good = case.search()
    hidden_with_nan = hidden.clone()
    hidden_with_nan[1] = torch.nan
    beams = case.search(hidden_NSH=hidden_with_nan)
    assert int(beams.valid_N[1]) == 0
    for request in (0, 2):
        assert answer(beams, request) == answer(good, request)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("over_catalogue", [False, True])
def test_realistic_sizes_against_brute_force(dtype, over_catalogue):
    """float32 products round differently by shape: scores to 1e-4, order where scores differ by more."""
    torch.manual_seed(0)
    head = DraftHead(64, (64, 32, 48), dtype=dtype).requires_grad_(False)
    head.over_catalogue = over_catalogue
    keys = np.unique(np.random.default_rng(0).integers(0, 64 * 32 * 48, 5000))
    hidden = torch.randn(2, 4, 64, dtype=dtype)
    beams = Case(head, keys, hidden, [len(keys)] * 2, [True] * 2).search()
    for request in range(2):
        assert_best_of(brute_force(head, hidden[request], keys), answer(beams, request), tolerance=1e-4)


@pytest.mark.parametrize(("keys", "width"), [([], 3), ([1], 0)])
def test_an_impossible_search_is_stopped(keys, width):
    case = Case(
        make_head("random", (2, 2), 2, 0), np.array(keys, np.int64), torch.zeros(1, 3, 2).double(), [width], [True]
    )
    with pytest.raises(AssertionError):
        case.search()
