"""Segments: named sets of items, such as a market or what is in stock, published with the catalogue.

Each is a column ``segment:NAME`` of the items, which Arrow keeps as a bitmap: one bit an item, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nezha_vllm.columns import one_array
from nezha_vllm.manifest import CatalogueError

PREFIX = "segment:"
MAX_SEGMENTS, MAX_NAME = 256, 64


@dataclass(frozen=True, eq=False)
class Segments:
    """``bits`` uint8 [ceil(items / 8)] a segment: bit i of byte b, from the lowest on, stands for row 8 · b + i."""

    names: list[str]
    bits: list[np.ndarray]

    @classmethod
    def of(cls, items: pa.Table) -> Segments:
        names = segment_names(items)
        return cls(names, [_bits(one_array(items[PREFIX + name])) for name in names])

    def holds(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Whether each of the rows is in the segment; none is where there is no such segment."""
        if name not in self.names:
            return np.zeros(len(rows), bool)
        return self.combination([name], []).holds(rows)

    def combination(self, all_of: Iterable[str], none_of: Iterable[str]) -> Combination:
        """All names must be known."""
        return Combination(self, self._places(all_of), self._places(none_of))

    def _places(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted({self.names.index(name) for name in names}))


@dataclass(frozen=True, eq=False)
class Combination:
    """The items that are in each segment of ``all_of`` and in none of ``none_of``: ascending places in the list."""

    segments: Segments
    all_of: tuple[int, ...]
    none_of: tuple[int, ...]

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of the rows is one of its items."""
        held = np.ones(len(rows), bool)
        byte, bit = rows >> 3, (rows & 7).astype(np.uint8)
        for places, wanted in ((self.all_of, 1), (self.none_of, 0)):
            for place in places:
                held &= (self.segments.bits[place][byte] >> bit) & 1 == wanted
        return held


def segment_names(items: pa.Table) -> list[str]:
    return [name.removeprefix(PREFIX) for name in items.column_names if name.startswith(PREFIX)]


def segment_columns(segments: Mapping[str, Sequence[bool] | np.ndarray | pa.Array], count: int) -> dict[str, pa.Array]:
    """Columns of the items' table, in order of name. Raises ``CatalogueError`` naming the segment."""
    if len(segments) > MAX_SEGMENTS:
        raise CatalogueError(f"{len(segments)} segments are more than {MAX_SEGMENTS}")
    columns: dict[str, pa.Array] = {}
    for name in sorted(segments):
        if not 1 <= len(name) <= MAX_NAME:
            raise CatalogueError(f"segment name {name!r} must have 1 to {MAX_NAME} characters")
        values: Any = segments[name]
        column = one_array(values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values))
        if column.type != pa.bool_() or column.null_count or len(column) != count:
            raise CatalogueError(f"segment {name!r} needs {count} values true or false, one an item")
        columns[PREFIX + name] = column
    return columns


def check_segments(items: pa.Table, manifest: Mapping[str, Any]) -> None:
    """Raise ``CatalogueError`` unless the segments are the ones that the manifest names, and bitmaps."""
    names = segment_names(items)
    if names != manifest.get("segments", []) or len(set(names)) != len(names):
        raise CatalogueError(f"the items have segments {names}, the manifest promises {manifest.get('segments', [])}")
    for name in names:
        column = items[PREFIX + name]
        if column.type != pa.bool_() or column.null_count or len(column) != manifest["num_items"]:
            raise CatalogueError(f"segment {name!r} must have true or false for every item")
        column.validate(full=True)  # the bitmap is read without Arrow


def _bits(column: pa.BooleanArray) -> np.ndarray:
    buffer = column.buffers()[1]
    if column.offset or buffer is None:
        return np.packbits(column.to_numpy(zero_copy_only=False), bitorder="little")
    return np.frombuffer(buffer, np.uint8)[: -(-len(column) // 8)]
