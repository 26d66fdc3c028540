"""A table of items in a columnar file (Parquet, Arrow, CSV) → a catalogue. Messages count rows from 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nezha_vllm.catalogue import Catalogue, CatalogueError
from nezha_vllm.columns import one_array
from nezha_vllm.segments import MAX_SEGMENTS

STRINGS = (pa.string(), pa.large_string())
SUFFIXES = (".parquet", ".arrow", ".feather", ".csv", ".csv.gz")


def read_table(path: Path, text: Sequence[str] = ()) -> pa.Table:
    """The file's table; the columns ``text`` of a CSV file are not taken for numbers. Raises ``CatalogueError``."""
    if not path.is_file():
        raise CatalogueError(f"{path} is missing")
    if not path.name.endswith(SUFFIXES):
        raise CatalogueError(f"{path}: which format is this? Its name should end in one of {', '.join(SUFFIXES)}")
    try:
        if path.name.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path)
        if path.name.endswith((".csv", ".csv.gz")):
            from pyarrow import csv

            types = csv.ConvertOptions(column_types={name: pa.string() for name in text}, strings_can_be_null=False)
            return csv.read_csv(path, convert_options=types)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise CatalogueError(f"{path} cannot be read: {error}") from error


def build(
    path: Path,
    codebook_sizes: Sequence[int],
    *,
    item_id: str = "item_id",
    codes: Sequence[str] = ("codes",),
    weight: str | None = None,
    metadata: Sequence[str] | None = None,
    segments: Sequence[str] = (),
    shared_ids: str | None = None,
    version: str | None = None,
) -> Catalogue:
    """A catalogue of the file's items.

    Args:
        codes: one column of lists, or one column of integers a level.
        weight: column of the weights; by default ``weight`` if there is one, else all are 0.
        metadata: columns to keep; all others by default.
        segments: columns of true and false, each a segment of the column's name, or of lists of segments' names.

    Raises:
        CatalogueError: what is wrong with which column and row, and what to do.
    """
    table = read_table(path, text=[item_id])
    if weight is None and "weight" in table.column_names:
        weight = "weight"
    used = [item_id, *codes, *([weight] if weight else []), *segments]
    others = [name for name in table.column_names if name not in used] if metadata is None else list(metadata)
    for name in [*used, *others]:
        if table.column_names.count(name) != 1:
            raise CatalogueError(
                f"{path} needs one column {name!r}, it has {table.column_names}; name yours with --item-id, --codes, "
                "--weight, --segments and --metadata"
            )
    try:
        return Catalogue.build(
            _item_ids(table[item_id], item_id),
            _codes(table, codes, len(codebook_sizes)),
            codebook_sizes,
            metadata={name: table[name] for name in others},
            weights=_weights(table[weight], weight) if weight else None,
            segments=_segments(table, segments),
            shared_ids=shared_ids,
            version=version,
        )
    except ValueError as error:
        raise CatalogueError(f"{path}: {error}") from None


def _item_ids(column: pa.ChunkedArray, name: str) -> pa.Array:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or kind in (pa.string(), pa.large_string(), pa.string_view())):
        raise CatalogueError(f"column {name!r} has type {column.type}; item IDs are strings or integers")
    return one_array(column.cast(pa.large_string() if kind == pa.large_string() else pa.string()))


def _codes(table: pa.Table, names: Sequence[str], levels: int) -> np.ndarray:
    if len(names) > 1 or (levels == 1 and pa.types.is_integer(table[names[0]].type)):
        if len(names) != levels:
            raise CatalogueError(f"{len(names)} columns of codes {list(names)} for {levels} codebook sizes")
        return np.stack([_integers(table[name], name) for name in names], axis=1)
    name, column = names[0], one_array(table[names[0]])
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise CatalogueError(
            f"column {name!r} has type {kind}; codes are a column of lists, or one column of integers a level, named "
            "in order: --codes code_1,code_2,code_3"
        )
    wrong = pc.not_equal(pc.list_value_length(column), levels).fill_null(True)
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        raise CatalogueError(f"column {name!r} needs {levels} codes in every row, row {row} has {column[row].as_py()}")
    flat = _integers(pa.chunked_array([column.flatten()]), name, levels)
    return flat.reshape(len(column), levels)


def _segments(table: pa.Table, names: Sequence[str]) -> dict[str, pa.Array | np.ndarray]:
    found: dict[str, pa.Array | np.ndarray] = {}
    for name in names:
        column = one_array(table[name])
        kind = column.type
        _no_nulls(table[name], name)
        if pa.types.is_boolean(kind):
            members: dict[str, pa.Array | np.ndarray] = {name: column}
        elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and kind.value_type in STRINGS:
            members = _members(column, name)
        else:
            raise CatalogueError(
                f"column {name!r} has type {kind}; segments are columns of true and false or of lists of strings"
            )
        twice = sorted(found.keys() & members.keys())
        if twice:
            raise CatalogueError(f"column {name!r} has segments {twice[:5]} that another column has, too; rename them")
        found |= members
    return found


def _members(column: pa.ListArray, name: str) -> dict[str, np.ndarray]:
    """For each string of a column of lists, which rows have it."""
    strings = column.flatten()
    row_of = pc.list_parent_indices(column).to_numpy()
    if strings.null_count:
        row = row_of[pc.index(pc.is_null(strings), True).as_py()]
        raise CatalogueError(f"column {name!r} has nothing in a list in row {row}; fill it in or remove it")
    encoded = strings.dictionary_encode()
    if len(encoded.dictionary) > MAX_SEGMENTS:
        raise CatalogueError(f"column {name!r} has {len(encoded.dictionary)} segments, more than {MAX_SEGMENTS}")
    which, members = encoded.indices.to_numpy(), {}
    for at, segment in enumerate(encoded.dictionary.to_pylist()):
        members[segment] = np.zeros(len(column), bool)
        members[segment][row_of[which == at]] = True
    return members


def _integers(column: pa.ChunkedArray, name: str, per_row: int = 1) -> np.ndarray:
    _no_nulls(column, name, per_row)
    if not pa.types.is_integer(column.type):
        raise CatalogueError(f"column {name!r} holds {column.type}; codes are integers, counted from 0")
    return one_array(column).to_numpy()


def _weights(column: pa.ChunkedArray, name: str) -> np.ndarray:
    _no_nulls(column, name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise CatalogueError(f"column {name!r} holds {column.type}; weights are numbers")
    with np.errstate(over="ignore"):
        weights = one_array(column).to_numpy().astype(np.float32)
    if not np.isfinite(weights).all():
        row = int(np.argmin(np.isfinite(weights)))
        raise CatalogueError(f"weight {column[row].as_py()} of column {name!r} in row {row} is no finite float32")
    return weights


def _no_nulls(column: pa.ChunkedArray, name: str, per_row: int = 1) -> None:
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py() // per_row
        raise CatalogueError(f"column {name!r} has nothing in row {row}; fill it in or remove the row")
