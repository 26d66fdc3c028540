"""The catalogue as a mapping between items and semantic IDs: order, look-ups, what cannot be built."""

from __future__ import annotations

import hashlib
import random
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import code_rows, small_codebooks

from nezha_vllm.catalogue import Catalogue, CatalogueError, UnknownItemError, load_keys
from nezha_vllm.semantic_id import SemanticIdCodec

item_id_text = st.text(st.characters(exclude_characters=">", exclude_categories=["Cs"]), min_size=1, max_size=8)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def catalogue_parts(draw: st.DrawFn) -> dict:
    """Arguments of ``Catalogue.build``: few distinct semantic IDs, so that items share them; weights that tie."""
    sizes = draw(small_codebooks(max_levels=4, max_size=4))
    codes = draw(code_rows(sizes, max_rows=20))
    ids = draw(st.lists(item_id_text, min_size=len(codes), max_size=len(codes), unique=True))
    weights = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), finite)
    return {
        "item_ids": ids,
        "codes": codes,
        "codebook_sizes": sizes,
        "weights": draw(st.none() | st.lists(weights, min_size=len(ids), max_size=len(ids))),
        "metadata": {"title": [f"title of {item_id}" for item_id in ids], "year": list(range(len(ids)))},
    }


def rows_as_lists(catalogue: Catalogue) -> list[tuple[str, list[int]]]:
    return [(catalogue.item_id(row), catalogue.codes[row].tolist()) for row in range(catalogue.num_items)]


def assert_same(one: Catalogue, other: Catalogue) -> None:
    assert one.version == other.version
    assert one.codec == other.codec
    assert one.items.equals(other.items)
    for name in ("keys", "first_row", "rows_by_id"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@given(catalogue_parts())
def test_items_come_by_semantic_id_then_weight_then_item_id(parts):
    ids, codes = parts["item_ids"], parts["codes"].tolist()
    weights = parts["weights"] or [0.0] * len(ids)
    triples = zip(codes, weights, ids, strict=True)
    expected = sorted(triples, key=lambda item: (item[0], -item[1], item[2].encode()))
    catalogue = Catalogue.build(**parts)
    assert rows_as_lists(catalogue) == [(item_id, code) for code, _, item_id in expected]


@given(catalogue_parts())
def test_every_item_is_found_with_its_codes_and_metadata(parts):
    catalogue = Catalogue.build(**parts)
    for position, item_id in enumerate(parts["item_ids"]):
        row = catalogue.row(item_id)
        assert catalogue.item_id(row) == item_id
        assert catalogue.codes_of(item_id) == parts["codes"][position].tolist()
        assert catalogue.metadata(row) == {"title": f"title of {item_id}", "year": position}


@given(catalogue_parts())
def test_items_of_one_semantic_id_are_its_rows(parts):
    catalogue = Catalogue.build(**parts)
    members: dict[tuple[int, ...], set[str]] = {}
    for item_id, codes in zip(parts["item_ids"], parts["codes"].tolist(), strict=True):
        members.setdefault(tuple(codes), set()).add(item_id)
    assert catalogue.num_ids == len(members)
    assert catalogue.keys.tolist() == sorted(catalogue.codec.key(np.array(list(members))).tolist())
    for index, key in enumerate(catalogue.keys):
        rows = catalogue.rows_of_index(index)
        assert {catalogue.item_id(row) for row in rows} == members[tuple(catalogue.codec.codes_of_key(key).tolist())]


@given(catalogue_parts(), st.text(max_size=8) | st.sampled_from(["\ud800", "item\udfff", "\x00"]))
def test_an_item_that_is_not_there_is_unknown(parts, wanted):
    catalogue = Catalogue.build(**parts)
    if wanted not in parts["item_ids"]:
        with pytest.raises(UnknownItemError, match="is not in the catalogue"):
            catalogue.row(wanted)


@given(catalogue_parts())
def test_saving_and_loading_keep_everything(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("catalogue") / "it"
    catalogue = Catalogue.build(**parts)
    catalogue.save(folder)
    loaded = Catalogue.load(folder)
    assert_same(loaded, catalogue)
    assert [loaded.row(item_id) for item_id in parts["item_ids"]] == [catalogue.row(i) for i in parts["item_ids"]]
    codec, version, keys, segments, first_row = load_keys(folder)
    assert segments is first_row is None
    assert (codec, version) == (catalogue.codec, catalogue.version)
    np.testing.assert_array_equal(keys, catalogue.keys)


@given(catalogue_parts(), st.randoms())
def test_the_version_names_the_content_not_the_order_it_came_in(parts, rng):
    order = list(range(len(parts["item_ids"])))
    rng.shuffle(order)
    shuffled = parts | {
        "item_ids": [parts["item_ids"][i] for i in order],
        "codes": parts["codes"][order],
        "weights": parts["weights"] and [parts["weights"][i] for i in order],
        "metadata": {name: [values[i] for i in order] for name, values in parts["metadata"].items()},
    }
    version = Catalogue.build(**parts).version
    assert Catalogue.build(**shuffled).version == version
    other = parts | {"item_ids": [*parts["item_ids"][:-1], parts["item_ids"][-1] + "x" * 9]}
    assert Catalogue.build(**other).version != version
    assert Catalogue.build(**parts, version="v7").version == "v7"


def built_item_by_item(item_ids, codes, codebook_sizes, metadata, weights) -> tuple[str, list, list]:
    """Version, first rows and rows by ID as they were made before building was vectorised."""
    codec = SemanticIdCodec(codebook_sizes)
    weights = [0.0] * len(item_ids) if weights is None else weights
    keys = codec.key(codes).tolist()
    order = sorted(range(len(item_ids)), key=lambda at: (keys[at], -weights[at], item_ids[at].encode()))
    columns = {
        "item_id": pa.array([item_ids[at] for at in order], pa.string()),
        "codes": pa.array([codes[at].tolist() for at in order], pa.list_(pa.int32(), codec.num_levels)),
        "weight": pa.array([weights[at] for at in order], pa.float32()),
    }
    columns |= {name: pa.array([values[at] for at in order]) for name, values in metadata.items()}
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    digest = hashlib.sha256(repr(codec.codebook_sizes).encode() + sink.getvalue().to_pybytes())
    first = [row for row, at in enumerate(order) if row == 0 or keys[order[row - 1]] != keys[at]]
    by_id = sorted(range(len(order)), key=lambda row: item_ids[order[row]].encode())
    return digest.hexdigest()[:12], [*first, len(order)], by_id


@given(catalogue_parts())
def test_building_by_columns_gives_what_building_item_by_item_gives(parts):
    catalogue = Catalogue.build(**parts)
    version, first_row, rows_by_id = built_item_by_item(**parts)
    assert catalogue.version == version
    assert catalogue.first_row.tolist() == first_row
    assert catalogue.rows_by_id.tolist() == rows_by_id


@given(catalogue_parts())
def test_arrow_columns_give_what_lists_give(parts):
    columns = parts | {
        "item_ids": pa.chunked_array([pa.array(parts["item_ids"][:1]), pa.array(parts["item_ids"][1:], pa.string())]),
        "metadata": {name: pa.chunked_array([pa.array(values)]) for name, values in parts["metadata"].items()},
    }
    assert_same(Catalogue.build(**columns), Catalogue.build(**parts))


GOOD = {"item_ids": ["a", "b"], "codes": [[0, 1], [1, 0]], "codebook_sizes": (2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": [], "codes": []}, "at least one item"),
        ({"item_ids": ["a", "a"]}, "'a' appears 2 times"),
        ({"item_ids": ["a", ""]}, "'' in row 1"),
        ({"item_ids": ["a", "b>"]}, "'b>' in row 1"),
        ({"item_ids": ["a", 7]}, "7 in row 1"),
        ({"item_ids": ["a", b"b"]}, "b'b' in row 1"),
        ({"item_ids": ["a", None]}, "None in row 1"),
        ({"item_ids": pa.array(["a", None])}, "None in row 1"),
        ({"item_ids": pa.array(["a", "b>"])}, "'b>' in row 1"),
        ({"item_ids": pa.array([1, 2])}, "must be strings, got int64"),
        ({"item_ids": pa.array([b"a", b"\xff"]).view(pa.string())}, "cannot be read"),
        ({"item_ids": ["a", "\ud800"]}, "in row 1 must be a non-empty Unicode string"),
        ({"codes": [[0, 1], [1, 2]]}, "code 2 of level 2 in row 1 is out of range"),
        ({"codes": [[0, 1]]}, r"shape \(2, 2\)"),
        ({"codes": [0, 1, 1, 0]}, r"shape \(2, 2\)"),
        ({"codes": [[0], [1], [1], [0]]}, r"shape \(2, 2\)"),
        ({"codes": [[0, 1], [1]]}, "inhomogeneous"),
        ({"codes": [[0.0, 1.0], [1.0, 0.0]]}, "codes must be integers"),
        ({"codebook_sizes": (2, 2**32)}, "int32"),
        ({"metadata": {"weight": [1, 2]}}, "'weight' has a reserved name"),
        ({"metadata": {"title": ["x"]}}, "'title' has 1 values for 2 items"),
        ({"weights": [1.0]}, "one an item"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, 1e39]}, "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_what_is_no_catalogue_is_refused_with_its_reason(change, message):
    assert Catalogue.build(**GOOD).num_items == 2
    with pytest.raises(CatalogueError, match=message):
        Catalogue.build(**(GOOD | change))


@pytest.mark.slow
def test_a_million_items_take_seconds_and_look_ups_microseconds(tmp_path):
    count, rng = 1_000_000, np.random.default_rng(0)
    ids = [f"film-{number}-é" for number in rng.permutation(count)]
    codes = rng.integers(0, 512, (count, 3))
    start = time.perf_counter()
    Catalogue.build(ids, codes, (512,) * 3).save(tmp_path / "large")
    built = time.perf_counter()
    catalogue = Catalogue.load(tmp_path / "large")
    loaded = time.perf_counter()
    asked = random.Random(0).sample(ids, 5000)
    for item_id in asked:
        catalogue.row(item_id)
    looked_up = time.perf_counter()
    assert built - start < 30
    assert loaded - built < 10
    assert (looked_up - loaded) / len(asked) < 200e-6
