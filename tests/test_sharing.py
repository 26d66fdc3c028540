"""Items of ranked semantic IDs: by policy, capped, and without those a rule leaves out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nezha_vllm.catalogue import Catalogue, CatalogueError
from nezha_vllm.config import SHARED_ID_POLICIES
from nezha_vllm.eligibility import eligibility
from nezha_vllm.sharing import ranked_rows

GROUPS = {0: "abc", 1: "d", 2: "ef", 3: "ghij"}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    names = "".join(GROUPS.values())
    codes = [[code] for code, items in GROUPS.items() for _ in items]
    return Catalogue.build(list(names), np.array(codes), [4])


def names(catalogue: Catalogue, rows: np.ndarray) -> str:
    return "".join(catalogue.item_ids(rows.tolist()))


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("expand", {}, "efabcghi"),
        ("first", {}, "eag"),
        ("round_robin", {}, "eagfbhci"),
        ("expand", {"max_per_id": 2}, "efabgh"),
        ("round_robin", {"max_per_id": 2}, "eagfbh"),
    ],
)
def test_policies_and_caps(catalogue: Catalogue, policy: str, options: dict, expected: str) -> None:
    rows, ranks = ranked_rows(catalogue, np.array([2, 0, 3]), 8, policy=policy, **options)
    assert names(catalogue, rows) == expected
    assert [GROUPS[[2, 0, 3][rank]].count(name) for rank, name in zip(ranks, expected, strict=True)] == [1] * len(rows)


def test_a_catalogue_brings_its_policy_along_and_is_another_version_by_it(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from nezha_vllm.frontend.answers import rank
    from nezha_vllm.frontend.options import Plan
    from nezha_vllm.payload import RankedIds

    found, versions = {}, set()
    for policy in (None, *SHARED_ID_POLICIES):
        built = Catalogue.build(list("abc"), [[0], [0], [1]], [2], shared_ids=policy)
        built.save(tmp_path / "catalogue")
        loaded = Catalogue.load(tmp_path / "catalogue")
        versions.add(loaded.version)
        service: Any = SimpleNamespace(catalogue=loaded, settings=SimpleNamespace(shared_ids="first"))
        best = RankedIds(np.array([0, 1]), np.array([[-1.0], [-2.0]]), num_drafted=2, num_valid=2)
        found[policy] = "".join(rank(Plan(service, 3, 3, "stepwise", False), best).item_ids)
    assert found == {None: "ac", "expand": "abc", "first": "ac", "round_robin": "acb"}
    assert len(versions) == 4
    with pytest.raises(CatalogueError, match="shared_ids is 'last'"):
        Catalogue.build(["a"], [[0]], [2], shared_ids="last")


def plain(ranked: list[int], n: int, policy: str, cap: int, hidden: set[str]) -> str:
    groups = [
        [item for item in GROUPS[code] if item not in hidden][: 1 if policy == "first" else cap] for code in ranked
    ]
    if policy != "round_robin":
        return "".join(item for group in groups for item in group)[:n]
    turns = range(max(map(len, groups), default=0))
    return "".join(group[turn] for turn in turns for group in groups if turn < len(group))[:n]


@given(
    st.permutations(range(4)),
    st.integers(0, 4),
    st.integers(1, 12),
    st.sampled_from(SHARED_ID_POLICIES),
    st.integers(1, 5),
    st.sets(st.sampled_from("abcdefghij")),
)
def test_it_equals_a_plain_loop(catalogue: Catalogue, order, count, n, policy, cap, hidden) -> None:
    excluded = np.array(catalogue.rows(sorted(hidden)), np.int64)
    rule = eligibility(catalogue, None, excluded)
    positions = np.array(order[:count], np.int64)
    rows, _ = ranked_rows(catalogue, positions, n, policy=policy, max_per_id=cap, eligible=rule)
    assert names(catalogue, rows) == plain(order[:count], n, policy, cap, hidden)
