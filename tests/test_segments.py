"""Segments from a table to the search: built, kept, refused, and combined on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from test_catalogue_folder import reseal, write_items

from nezha_vllm import segment_ranks
from nezha_vllm.catalogue import ITEMS, Catalogue, CatalogueError, load_keys
from nezha_vllm.item_table import build
from nezha_vllm.segment_ranks import SegmentRanks
from nezha_vllm.store import Store

SIZES = (2, 4)
COLUMNS = {
    "item_id": ["a", "b", "c", "d"],
    "codes": [[1, 0], [0, 3], [1, 0], [0, 1]],
    "title": ["A", "B", "C", "D"],
    "in stock": [True, False, True, True],
    "markets": [["se", "no"], [], ["no"], ["se", "se"]],
}


def table(folder: Path, **changes: object) -> Path:
    parquet.write_table(pa.table(COLUMNS | changes), folder / "items.parquet")
    return folder / "items.parquet"


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return build(table(tmp_path), SIZES, segments=["in stock", "markets"], version="one")


def members(catalogue: Catalogue, *combination: list[str]) -> set[str]:
    rows = np.flatnonzero(catalogue.segments.combination(*combination).holds(np.arange(catalogue.num_items)))
    return set(catalogue.item_ids(rows.tolist()))


def test_columns_become_segments_that_a_folder_keeps(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.save(tmp_path / "saved")
    loaded, keys = Catalogue.load(tmp_path / "saved"), load_keys(tmp_path / "saved")
    assert loaded.segments.names == keys.segments.names == ["in stock", "no", "se"]
    assert [bits.tolist() for bits in keys.segments.bits] == [bits.tolist() for bits in loaded.segments.bits]
    assert keys.first_row.tolist() == [0, 1, 2, 4]
    for name, expected in (("in stock", "acd"), ("no", "ac"), ("se", "ad")):
        assert members(loaded, [name], []) == set(expected)
    assert members(loaded, ["no", "se"], []) == {"a"}
    assert members(loaded, ["in stock"], ["no"]) == {"d"}
    assert members(loaded, [], ["in stock"]) == {"b"}
    assert loaded.metadata(loaded.row("b")) == {"title": "B"}


def test_another_segment_is_another_version() -> None:
    plain, one, other = (
        Catalogue.build(["a", "b"], [[0], [1]], [2], segments=segments)
        for segments in (None, {"s": [True, False]}, {"s": [True, True]})
    )
    assert len({plain.version, one.version, other.version}) == 3


@pytest.mark.parametrize(
    ("changes", "segments", "message"),
    [
        ({"in stock": [True, None, True, True]}, ["in stock"], "column 'in stock' has nothing in row 1"),
        ({"markets": [["se"], None, [], []]}, ["markets"], "column 'markets' has nothing in row 1"),
        ({"markets": [["se"], [], [None], []]}, ["markets"], "nothing in a list in row 2"),
        ({"markets": [["in stock"], [], [], []]}, ["in stock", "markets"], r"segments \['in stock'\] that another"),
        ({"markets": [[""], [], [], []]}, ["markets"], "segment name '' must have"),
        ({"markets": [[f"m{n}" for n in range(300)], [], [], []]}, ["markets"], "300 segments, more than 256"),
        ({}, ["title"], "columns of true and false or of lists of strings"),
        ({}, ["price"], "needs one column 'price'"),
        ({"segment:x": [1, 2, 3, 4]}, [], "'segment:x' is named like a segment"),
    ],
)
def test_what_is_no_segment_is_refused(tmp_path: Path, changes: dict, segments: list[str], message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        build(table(tmp_path, **changes), SIZES, segments=segments)


def test_a_writer_that_keeps_no_bitmap_is_found_out(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.save(tmp_path / "saved")
    at = catalogue.items.column_names.index("segment:no")
    for column in (pa.array([1, 0, 1, 0]), pa.array([True, None, True, False])):
        write_items(tmp_path / "saved", catalogue.items.set_column(at, "segment:no", column))
        reseal(tmp_path / "saved")
        for load in (Catalogue.load, load_keys):
            with pytest.raises(CatalogueError, match="'no' must have true or false for every item"):
                load(tmp_path / "saved")
    write_items(tmp_path / "saved", catalogue.items.remove_column(at))
    reseal(tmp_path / "saved")
    with pytest.raises(CatalogueError, match="the manifest promises"):
        load_keys(tmp_path / "saved")


def test_an_engine_refuses_damaged_segments(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.save(tmp_path / "saved")
    path = tmp_path / "saved" / ITEMS
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CatalogueError, match=ITEMS):
        load_keys(tmp_path / "saved")


def test_a_store_keeps_the_segments_that_requests_name(catalogue: Catalogue, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    catalogue.save(tmp_path / "one")
    build(tmp_path / "items.parquet", SIZES, segments=["in stock"], version="two").save(tmp_path / "two")
    store.publish(tmp_path / "one")
    with pytest.raises(CatalogueError, match=r"segments \['no', 'se'\] of current version one are missing"):
        store.publish(tmp_path / "two")
    assert store.publish(tmp_path / "two", force=True)[0].version == "two"


def test_combinations_are_counted_and_the_ones_asked_for_last_stay(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_ranks, "MAX_COMBINATIONS", 2)
    ranks = SegmentRanks(catalogue.segments.bits, catalogue.first_row, "cpu")
    stock, both, neither = ((0,), ()), ((1, 2), ()), ((), (0, 1))
    expected = {stock: [0, 1, 1, 2], both: [0, 0, 0, 1], neither: [0, 0, 1, 1]}  # of d, b, then a and c

    def step(*combinations: segment_ranks.Places) -> list[int | None]:
        ranks.new_step()
        places = [ranks.place(combination) for combination in combinations]
        for combination, at in zip(combinations, places, strict=True):
            array = ranks.array(combination) if at is None else ranks.ranks[at : at + 4]
            assert array.dtype == torch.int32
            assert array.tolist() == expected[combination]
        return places

    assert step(stock, both, stock) == [0, 4, 0]
    assert step(neither) == [4]  # stock was asked for after both
    assert step(stock, neither) == [0, 4]
    assert step(both, neither, stock) == [0, 4, None]  # a place that the step uses is not taken away
    assert step(stock) == [0]
