"""Rules of a request: the answer is the one of a catalogue that holds the eligible items alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_search import Answer, plain_search
from test_beam_search import Case, answer, cases

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.draft_head import Beams, Eligible
from nezha_vllm.eligibility import eligibility
from nezha_vllm.segment_ranks import SegmentRanks

SIZES = [4, 5]
NAMES = [f"i{number}" for number in range(12)]


@pytest.fixture
def catalogue() -> Catalogue:
    """Twelve items on eight semantic IDs: three share the first, two each of two others."""
    codes = [[0, 0]] * 3 + [[0, 3]] * 2 + [[1, 1]] * 2 + [[1, 2], [2, 0], [2, 4], [3, 3], [3, 4]]
    return Catalogue.build(NAMES, np.array(codes), SIZES, segments={"sold": [n in (0, 5, 6) for n in range(12)]})


def ruled_search(case: Case, rule: Eligible) -> Beams:
    """Every second request under the rule."""
    return case.search([rule if request % 2 == 0 else None for request in range(len(case.widths))])


@given(cases(max_keys=300), st.data())
def test_a_search_under_rules_equals_the_search_of_the_eligible_catalogue(case: Case, data: st.DataObject) -> None:
    """But for a softmax over the catalogue: its probabilities stay those of the whole one, see `plain_search`."""
    count, requests = len(case.keys), len(case.widths)
    only = data.draw(st.booleans())
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True).map(sorted))
    listed = np.zeros(count, bool)
    listed[chosen] = True
    kept = np.flatnonzero(listed == only)
    found = ruled_search(case, Eligible(torch.tensor(chosen), only))
    everything = case.search()
    for request in range(requests):
        if request % 2:
            assert answer(found, request) == answer(everything, request)
        elif len(kept) == 0:
            assert int(found.valid_N[request]) == 0
        else:
            asked = case.hidden_NSH[request], case.keys, case.widths[request], case.stepwise[request]
            assert answer(found, request) == plain_search(case.head, *asked, eligible=kept.tolist())
            if not (case.head.over_catalogue and case.stepwise[request]):
                expected = answer(case.search(keys=case.keys[kept]), request)
                expected.index = kept[expected.index].tolist()
                assert answer(found, request) == expected


@given(cases(max_keys=200), st.data())
def test_a_rule_changes_no_score_of_the_items_it_leaves(case: Case, data: st.DataObject) -> None:
    """Beams as wide as the catalogue: what is left is the ranking without the rule, filtered afterwards."""
    count, requests = len(case.keys), len(case.widths)
    case.widths, case.stepwise = [count] * requests, [True] * requests
    only = data.draw(st.booleans())
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True).map(sorted))
    found, everything = ruled_search(case, Eligible(torch.tensor(chosen), only)), case.search()
    for request in range(0, requests, 2):
        whole = answer(everything, request)
        ranks = [rank for rank, index in enumerate(whole.index) if (index in chosen) == only]
        expected = [[values[rank] for rank in ranks] for values in (whole.index, whole.scores, whole.log_probs)]
        assert answer(found, request) == Answer(*expected, len(ranks))


def test_an_excluded_item_does_not_hide_those_that_share_its_id(catalogue: Catalogue) -> None:
    rows = np.array(catalogue.rows(["i0", "i3", "i4"]))
    rule = eligibility(catalogue, None, rows)
    assert not rule.only
    assert rule.positions.tolist() == [1]  # [0, 3] has lost both of its items, [0, 0] one of three
    kept = rule.keeps(np.arange(12))
    assert [catalogue.item_id(row) for row in np.flatnonzero(kept)] == [n for n in NAMES if n not in ("i0", "i3", "i4")]


def test_allowed_items_without_excluded_ones(catalogue: Catalogue) -> None:
    allowed, excluded = (np.array(catalogue.rows(names)) for names in (["i1", "i5", "i6", "i9"], ["i5", "i9"]))
    rule = eligibility(catalogue, allowed, excluded)
    assert rule.only
    assert [catalogue.item_id(row) for row in rule.rows] == ["i1", "i6"]
    assert rule.positions.tolist() == [0, 2]
    assert eligibility(catalogue, None, np.empty(0, np.int64)) is None


@given(st.data())
def test_segments_and_lists_leave_what_brute_force_leaves(data: st.DataObject) -> None:
    """Rows, and for every range of semantic IDs whether one of its items is left."""
    count = data.draw(st.integers(1, 40), "items")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    codes = np.stack([rng.integers(0, 2, count), rng.integers(0, SIZES[1], count)], axis=1)
    share = data.draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
    in_segments = {name: rng.random(count) < share for name in "abc"}
    built = Catalogue.build([f"i{n:02}" for n in range(count)], codes, SIZES, segments=in_segments)
    rows = st.lists(st.integers(0, count - 1), max_size=count)
    excluded, allowed = data.draw(rows, "excluded"), data.draw(st.none() | rows, "allowed")
    all_of, none_of = (data.draw(st.lists(st.sampled_from("abc"), max_size=2), "names") for _ in range(2))

    left = np.ones(count, bool) if allowed is None else np.isin(np.arange(count), allowed)
    left &= ~np.isin(np.arange(count), excluded)
    for name in "abc":
        column = built.items[f"segment:{name}"].to_numpy()
        left &= (column | (name not in all_of)) & (~column | (name not in none_of))

    combination = built.segments.combination(all_of, none_of) if all_of or none_of else None
    lists = None if allowed is None else np.array(allowed, np.int64), np.array(excluded, np.int64)
    rule = eligibility(built, *lists, combination)
    if rule is None:
        assert left.all()
        return
    assert rule.keeps(np.arange(count)).tolist() == left.tolist()
    ranks = None
    if rule.combination is not None:
        arrays = SegmentRanks(built.segments.bits, built.first_row, "cpu")
        ranks = arrays.array((rule.combination.all_of, rule.combination.none_of))
    low, high = torch.triu_indices(built.num_ids + 1, built.num_ids + 1)
    found = Eligible(torch.from_numpy(rule.positions.astype(np.int64)), rule.only, ranks).any_in(low, high)
    ranges = zip(built.first_row[low], built.first_row[high], strict=True)
    assert found.tolist() == [bool(left[first:behind].any()) for first, behind in ranges]


@pytest.fixture
def service(catalogue: Catalogue) -> SimpleNamespace:
    return SimpleNamespace(catalogue=catalogue, num_levels=2, code_token_offsets=(10, 20))


def test_a_history_is_its_named_items_and_whole_ids_elsewhere(service: SimpleNamespace) -> None:
    pytest.importorskip("vllm")
    from nezha_vllm.frontend.rules import PromptTokens, seen_rows

    tokens = [7, 10, 20, 11, 21, 13, 99]  # something, [0, 0], [1, 1], half an ID, a placeholder
    names = [service.catalogue.item_id(row) for row in seen_rows(service, tokens)]
    assert sorted(names) == ["i0", "i1", "i2", "i5", "i6"]
    named = PromptTokens(tokens)
    named.text = "<item:i1><b_1>"
    names = [service.catalogue.item_id(row) for row in seen_rows(service, named)]
    assert sorted(names) == ["i1", "i5", "i6"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"exclude_items": "i1"}, "exclude_items"),
        ({"exclude_items": [1.5]}, "exclude_items"),
        ({"exclude_items": ["i1"] * 65_537}, "exclude_items"),
        ({"allow_items": ["i1", "nobody"]}, "allow_items"),
        ({"exclude_history": "yes"}, "exclude_history"),
        ({"segments": "sold"}, "segments"),
        ({"segments": ["sold", "nowhere"]}, "segments"),
        ({"exclude_segments": ["nowhere"]}, "exclude_segments"),
        ({"min_score": "low"}, "min_score"),
        ({"min_score": float("nan")}, "min_score"),
        ({"min_score": True}, "min_score"),
        ({"min_score": 10**400}, "min_score"),
    ],
)
def test_rules_that_cannot_be_read_are_refused_by_name(service: SimpleNamespace, options: dict, name: str) -> None:
    exceptions = pytest.importorskip("vllm.exceptions")
    from nezha_vllm.frontend.rules import read_rules

    with pytest.raises(exceptions.VLLMValidationError) as error:
        read_rules(service, options, [])
    assert error.value.parameter == name


def test_a_min_score_beyond_every_score_is_a_number_too(service: SimpleNamespace) -> None:
    pytest.importorskip("vllm")
    from nezha_vllm.frontend.rules import read_rules

    assert read_rules(service, {"min_score": 1 << 64}, []).min_score == float(1 << 64)


def test_unknown_items_to_exclude_are_counted(service: SimpleNamespace) -> None:
    pytest.importorskip("vllm")
    from nezha_vllm.frontend.rules import read_rules

    rules = read_rules(service, {"exclude_items": ["nobody", "i1", 5]}, [])
    assert rules.unknown == 2
    assert len(rules.eligible.rows) == 1


def test_segments_are_read_by_name_and_an_unknown_one_is_told_those_there_are(service: SimpleNamespace) -> None:
    exceptions = pytest.importorskip("vllm.exceptions")
    from nezha_vllm.frontend.rules import NO_RULES, read_rules

    kept = read_rules(service, {"segments": ["sold"], "exclude_items": ["i0"]}, []).eligible.keeps(np.arange(12))
    assert [service.catalogue.item_id(row) for row in np.flatnonzero(kept)] == ["i5", "i6"]
    assert read_rules(service, {"segments": [], "exclude_segments": []}, []) == NO_RULES
    with pytest.raises(exceptions.VLLMValidationError, match=r"'nowhere' is not a segment .* which has sold"):
        read_rules(service, {"segments": ["nowhere"]}, [])
