"""Arrow columns as one array each: how items of a catalogue are kept, whatever they are built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nezha_vllm.manifest import CatalogueError

MAX_BYTES = 2**31 - 1  # of a column with 32-bit offsets
LARGE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The column as one array: where it lies if it is one (`combine_chunks` always copies), else a copy."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    if column.type in LARGE and column.nbytes > MAX_BYTES:
        column = column.cast(LARGE[column.type])
    return column.combine_chunks()


def metadata_column(values: Any) -> pa.Array:
    """Values of a metadata column as one array that can be reordered: with 64-bit offsets where 32 do not reach."""
    column = one_array(values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values))
    if column.type in LARGE and column.nbytes > MAX_BYTES:
        column = column.cast(LARGE[column.type])
    return column


def item_id_column(item_ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.StringArray:
    """Item IDs as one array. Raises ``CatalogueError`` naming the first that is none; duplicates are not looked for."""
    if len(item_ids) == 0:
        raise CatalogueError("a catalogue needs at least one item")
    ids = _strings(item_ids)
    if ids is None:
        assert not isinstance(item_ids, pa.Array | pa.ChunkedArray)
        row = next(row for row, item_id in enumerate(item_ids) if not _is_item_id(item_id))
    else:
        # a null is wrong too
        wrong = pc.or_(pc.equal(pc.binary_length(ids), 0), pc.match_substring(ids, ">")).fill_null(True)
        row = pc.index(wrong, True).as_py()
    if row >= 0:
        found = item_ids[row].as_py() if isinstance(item_ids, pa.Array | pa.ChunkedArray) else item_ids[row]
        raise CatalogueError(f"item ID {found!r} in row {row} must be a non-empty Unicode string without '>'")
    return ids


def check_distinct(ids: pa.StringArray, sorted_ids: pa.StringArray) -> None:
    """Raise ``CatalogueError`` naming the item ID that appears most often, if one appears twice."""
    if pc.any(pc.equal(sorted_ids[:-1], sorted_ids[1:]), min_count=0).as_py():
        counts = pc.value_counts(ids)
        most = int(np.argmax(counts.field("counts").to_numpy()))
        twice, times = counts[most]["values"].as_py(), counts[most]["counts"].as_py()
        raise CatalogueError(f"item ID {twice!r} appears {times} times")


def _strings(item_ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.StringArray | None:
    """As an Arrow array; None if a value is no string. Arrow would take bytes for one."""
    try:
        if isinstance(item_ids, pa.Array | pa.ChunkedArray):
            if item_ids.type not in (pa.string(), pa.large_string(), pa.string_view()):
                raise CatalogueError(f"item IDs must be strings, got {item_ids.type}")
            strings = one_array(item_ids).cast(pa.string())
            strings.validate(full=True)  # a file may hold what is no UTF-8
        elif not all(issubclass(kind, str) for kind in set(map(type, item_ids))):
            return None
        else:
            strings = pa.array(item_ids, pa.string())
    except (UnicodeEncodeError, pa.ArrowException) as error:
        if isinstance(item_ids, pa.Array | pa.ChunkedArray):
            raise CatalogueError(f"item IDs cannot be read: {error}") from None
        return None
    if isinstance(strings, pa.ChunkedArray):
        raise CatalogueError(f"item IDs take more than {MAX_BYTES} bytes together; use shorter ones")
    return strings


def _is_item_id(item_id: Any) -> bool:
    if not isinstance(item_id, str) or not item_id or ">" in item_id:
        return False
    try:
        item_id.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON may carry but UTF-8 cannot
        return False
    return True
