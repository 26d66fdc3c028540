"""Item IDs found in their Arrow column: the same answers as a dictionary, however few heads the index keeps."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nezha_vllm import item_index
from nezha_vllm.item_index import ItemIndex, UnknownItemError, _tags

letters = st.text(st.sampled_from("ab\0\x7f\x80é€𝄞"), min_size=1, max_size=12)  # 1 to 4 bytes a character
beginnings = st.sampled_from(["", "item-", "https://example.org/films/"])


def index_of(ids: list[str]) -> ItemIndex:
    column = pa.concat_arrays([pa.array(["skipped"]), pa.array(ids)])[1:]  # a slice: its buffers begin before it
    order = sorted(range(len(ids)), key=lambda row: ids[row].encode())
    return ItemIndex(column, np.array(order, np.int64))


@pytest.mark.parametrize(
    ("few", "bits", "tags"),
    [(0, 2, _tags), (0, 16, lambda heads: np.zeros(len(heads), np.uint8)), (100, 16, _tags)],
    ids=["by Arrow", "by Arrow, equal tags", "by Python"],
)
@pytest.mark.parametrize("max_heads", [1, 2, 5, 1 << 23])
@given(st.lists(letters, min_size=1, max_size=40, unique=True), st.lists(letters, max_size=10), beginnings)
def test_items_are_found_and_others_are_not(max_heads, few, bits, tags, endings, others, beginning):
    ids = [beginning + ending for ending in endings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_index, "MAX_HEADS", max_heads)
        patch.setattr(item_index, "FEW", few)
        patch.setattr(item_index, "AT_ONCE", 3)
        patch.setattr(item_index, "MAX_SPACED_BITS", bits)
        patch.setattr(item_index, "_tags", tags)
        index = index_of(ids)
        assert index.rows(ids) == list(range(len(ids)))
        assert index.ids(range(len(ids))) == ids
        asked = [*others, *(beginning + other for other in others), beginning, "", "\ud800", ids[0] + "a"]
        unknown = [other for other in asked if other not in ids]
        assert index.find([*unknown, ids[0], *unknown]) == [*[-1] * len(unknown), 0, *[-1] * len(unknown)]
        with pytest.raises(UnknownItemError):
            index.rows([ids[0], unknown[0]])


def test_unknown_items_among_others_take_one_pass(monkeypatch):
    index, passes = index_of(["a", "b"]), []
    monkeypatch.setattr(index, "_ranges", lambda heads, ranges=index._ranges: passes.append(heads) or ranges(heads))
    assert index.find(["x", "a", "y", "b", "a"]) == [-1, 0, -1, 1, 0]
    assert len(passes) == 1


def test_the_first_unknown_item_is_named():
    with pytest.raises(UnknownItemError, match="'x' is not in the catalogue"):
        index_of(["a", "b"]).rows(["a", "x", "y"])


def test_no_items_are_found_for_no_ids():
    assert index_of(["a"]).rows([]) == []
