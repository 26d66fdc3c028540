"""Two catalogues compared: the same as two dictionaries would say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.catalogue_diff import difference, examples, lost_share

segments = st.frozensets(st.sampled_from("xyz"))
item = st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 1.0]), segments)
items = st.dictionaries(st.text("abc", min_size=1, max_size=3), item, min_size=1, max_size=15)


def catalogue(content: dict[str, tuple[int, int, float, frozenset[str]]]) -> Catalogue:
    values = list(content.values())
    groups = {name: [name in value[3] for value in values] for name in frozenset().union(*(v[3] for v in values))}
    codes, weights = [value[:2] for value in values], [value[2] for value in values]
    return Catalogue.build(list(content), codes, (3, 2), weights=weights, segments=groups)


@given(items, items)
def test_a_difference_is_that_of_dictionaries(before, after):
    old, new = catalogue(before), catalogue(after)
    found = difference(old, new)
    both = before.keys() & after.keys()
    assert set(new.item_ids(found.added)) == after.keys() - before.keys()
    assert set(old.item_ids(found.removed)) == before.keys() - after.keys()
    assert set(new.item_ids(found.moved)) == {name for name in both if before[name][:2] != after[name][:2]}
    assert set(new.item_ids(found.reweighted)) == {name for name in both if before[name][2] != after[name][2]}
    assert set(new.item_ids(found.regrouped)) == {name for name in both if before[name][3] != after[name][3]}
    assert lost_share(old, new) == len(before.keys() - after.keys()) / len(before)
    assert sum(found.counts.values()) == sum(map(len, vars(found).values()))


def test_all_items_move_when_there_are_more_levels():
    old = Catalogue.build(["a", "b"], [[0, 0], [0, 1]], (2, 2))
    new = Catalogue.build(["a", "b"], [[0, 0, 0], [0, 1, 0]], (2, 2, 1))
    assert difference(old, new).counts == {"added": 0, "removed": 0, "moved": 2, "reweighted": 0, "regrouped": 0}


def test_examples_are_few_and_spread():
    many = Catalogue.build([f"{n:03}" for n in range(100)], [[n] for n in range(100)], (100,))
    assert examples(many, np.arange(100), 3) == ["000", "049", "099"]
    assert examples(many, np.arange(2), 3) == ["000", "001"]
    assert examples(many, np.arange(0), 3) == []
