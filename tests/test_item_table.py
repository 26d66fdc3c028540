"""Catalogues from Parquet, Arrow and CSV: the same whatever the format, and mistakes named with their row."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from nezha_vllm.catalogue import Catalogue, CatalogueError
from nezha_vllm.item_table import build

IDS = ["007", "a b", "é"]
CODES = [[0, 1], [1, 3], [0, 1]]
FLAT = {"item_id": IDS, "c1": [0, 1, 0], "c2": [1, 3, 1], "weight": [0.5, 0.0, 2.0], "title": ["x", "y, z", "w"]}
WANTED = Catalogue.build(IDS, CODES, (2, 4), weights=FLAT["weight"], metadata={"title": FLAT["title"]})


def write(folder: Path, suffix: str, columns: dict) -> Path:
    path, table = folder / f"items{suffix}", pa.table(columns)
    if suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif suffix == ".csv":
        csv.write_csv(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".csv"])
def test_every_format_gives_the_same_catalogue(tmp_path, suffix):
    catalogue = build(write(tmp_path, suffix, FLAT), (2, 4), codes=["c1", "c2"])
    assert catalogue.version == WANTED.version
    assert catalogue.items.equals(WANTED.items)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int16()), pa.list_(pa.uint8(), 2)])
def test_codes_may_be_lists(tmp_path, kind):
    columns = {name: FLAT[name] for name in ("item_id", "weight", "title")} | {"codes": pa.array(CODES, kind)}
    assert build(write(tmp_path, ".parquet", columns), (2, 4)).version == WANTED.version


def test_item_ids_may_be_integers_and_columns_have_other_names(tmp_path):
    path = write(tmp_path, ".parquet", {"id": [7, 8], "c": [0, 1], "rank": [1, 2], "year": [1999, 2000], "x": [0, 0]})
    catalogue = build(path, (2,), item_id="id", codes=["c"], weight="rank", metadata=["year"], version="v1")
    assert catalogue.ids.to_pylist() == ["7", "8"]
    assert catalogue.weights.tolist() == [1.0, 2.0]
    assert (catalogue.metadata(1), catalogue.version) == ({"year": 2000}, "v1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": ["a", "", "c"]}, "item ID '' in row 1"),
        ({"item_id": ["a", None, "c"]}, "item ID None in row 1"),
        ({"item_id": ["a", "b", "a"]}, "'a' appears 2 times"),
        ({"item_id": [0.5, 1.5, 2.5]}, "item IDs are strings or integers"),
        ({"codes": [[0, 1], [0], [0, 1]]}, r"needs 2 codes in every row, row 1 has \[0\]"),
        ({"codes": [[0, 1], None, [0, 1]]}, "row 1 has None"),
        ({"codes": [[0, 1], [0, None], [0, 1]]}, "column 'codes' has nothing in row 1"),
        ({"codes": [[0, 1], [0, 1], [0, 4]]}, "code 4 of level 2 in row 2 is out of range"),
        ({"codes": [[0.0, 1.0]] * 3}, "holds double; codes are integers"),
        ({"codes": ["0-1", "0-1", "0-2"]}, "--codes code_1,code_2,code_3"),
        ({"weight": [1.0, None, 2.0]}, "column 'weight' has nothing in row 1"),
        ({"weight": [1.0, 2.0, float("nan")]}, "weight nan of column 'weight' in row 2"),
        ({"weight": ["a", "b", "c"]}, "weights are numbers"),
        ({"other": [1, 2, 3], "codes": None}, r"needs one column 'codes', it has .*--codes"),
    ],
)
def test_mistakes_are_named_with_row_and_remedy(tmp_path, change, message):
    columns = {"item_id": ["a", "b", "c"], "codes": CODES, "weight": [0.0, 1.0, 2.0]} | change
    path = write(tmp_path, ".parquet", {name: values for name, values in columns.items() if values is not None})
    with pytest.raises(CatalogueError, match=message) as error:
        build(path, (2, 4))
    assert str(path) in str(error.value)


def test_as_many_columns_of_codes_as_levels(tmp_path):
    with pytest.raises(CatalogueError, match=r"2 columns of codes .* for 3 codebook sizes"):
        build(write(tmp_path, ".parquet", FLAT), (2, 4, 4), codes=["c1", "c2"])


@pytest.mark.parametrize("name", ["items.parquet", "items.arrow", "items.csv", "items.xlsx"])
def test_files_that_are_none_are_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(CatalogueError, match=f"{name} is missing"):
        build(path, (2, 4))
    path.write_bytes(b"")
    with pytest.raises(CatalogueError, match=name):
        build(path, (2, 4))
