"""Item IDs ↔ rows, read where they lie: in the buffers of a memory-mapped Arrow column, without an object an item."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HEAD_BYTES = 8
FEW = 100  # items that Python compares sooner than Arrow has begun
MAX_HEADS = 1 << 23  # 64 MB a process; beyond 8 million items, every 2nd, 3rd … has one


class UnknownItemError(KeyError):
    """An item ID that the catalogue does not hold."""

    def __str__(self) -> str:
        return f"item {self.args[0]!r} is not in the catalogue"


class ItemIndex:
    """Finds IDs by a binary search that takes its first steps for all of them at once.

    All IDs begin with the same ``shared`` bytes, often none. The 8 bytes behind these, as big-endian integers, ascend
    with the IDs: NumPy narrows each ID down to the few that share its 8 bytes. What is left is compared by Python, or
    for many IDs by Arrow, a step of the search for all of them at once.

    Args:
        ids: one ID a row.
        rows_by_id: int64 [rows], rows in order of their IDs' UTF-8 bytes.
    """

    def __init__(self, ids: pa.StringArray, rows_by_id: np.ndarray) -> None:
        self._ids = ids
        _, offsets, data = ids.buffers()
        self._starts = memoryview(offsets).cast("i")[ids.offset : ids.offset + len(ids) + 1]
        self._data = memoryview(data).cast("B")
        self._order = np.ascontiguousarray(rows_by_id).data  # its elements are Python's integers
        first, last = self._bytes(self._order[0]), self._bytes(self._order[-1])
        self._shared = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        self._stride = -(-len(ids) // MAX_HEADS)
        self._heads = _heads(ids, self._shared, np.asarray(rows_by_id)[:: self._stride])

    def ids(self, rows: Iterable[int]) -> list[str]:
        """The rows' item IDs."""
        starts, data = self._starts, self._data
        return [str(data[starts[row] : starts[row + 1]], "utf-8") for row in rows]

    def rows(self, item_ids: Sequence[str]) -> list[int]:
        """The items' rows. Raises ``UnknownItemError`` for the first that is none."""
        rows = self.find(item_ids)
        if -1 in rows:
            raise UnknownItemError(item_ids[rows.index(-1)])
        return rows

    def find(self, item_ids: Sequence[str]) -> list[int]:
        """The items' rows, -1 for those that are none."""
        if len(item_ids) > FEW:
            return self.find_many(item_ids).tolist()
        # surrogatepass: an ID that is no proper Unicode is unknown, not a crash
        wanted = [item_id.encode("utf-8", "surrogatepass") for item_id in item_ids]
        begin, end = self._shared, self._shared + HEAD_BYTES  # whether it begins like all IDs is seen at the end
        integers = [int.from_bytes(item[begin:end].ljust(HEAD_BYTES, b"\0"), "big") for item in wanted]
        lows, highs = self._ranges(np.array(integers, np.uint64))
        return list(map(self._row, wanted, lows.tolist(), highs.tolist()))

    def find_many(self, item_ids: Sequence[str]) -> np.ndarray:
        """`find` as an array; a long list takes a tenth of the time an item."""
        if len(item_ids) <= FEW:
            return np.array(self.find(item_ids), np.int64)
        try:
            wanted = pa.array(item_ids, pa.string())
        except UnicodeEncodeError:
            proper = np.array([_is_unicode(item_id) for item_id in item_ids])
            rows = np.full(len(item_ids), -1)
            rows[proper] = self.find_many([item_ids[place] for place in np.flatnonzero(proper)])
            return rows
        heads = _heads(wanted, self._shared, np.arange(len(wanted)))
        sort = np.argsort(heads)  # neighbours lie in the same pages
        wanted = wanted.take(pa.array(sort))
        at, end = self._ranges(heads[sort])
        end = np.minimum(end, len(self._order))
        end[end <= at + 1] = 0  # at most one place: `at`
        while len(open_ := np.flatnonzero(at < end)):
            middle = (at[open_] + end[open_]) // 2
            smaller = pc.less(self._at(middle), wanted.take(pa.array(open_))).to_numpy(zero_copy_only=False)
            at[open_[smaller]] = middle[smaller] + 1
            end[open_[~smaller]] = middle[~smaller]
        there = np.minimum(at, len(self._order) - 1)
        same = pc.equal(self._at(there), wanted).to_numpy(zero_copy_only=False) & (at == there)
        rows = np.empty(len(sort), np.int64)
        rows[sort] = np.where(same, np.asarray(self._order)[there], -1)
        return rows

    def _ranges(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of places in order of the IDs where those with these heads may be, first and last but one."""
        first = np.searchsorted(self._heads, heads)
        last = first + (self._heads[np.minimum(first, len(self._heads) - 1)] == heads)
        several = np.flatnonzero(self._heads[np.minimum(last, len(self._heads) - 1)] == heads)
        last[several] = np.searchsorted(self._heads, heads[several], "right")
        return np.maximum((first - 1) * self._stride + 1, 0), last * self._stride

    def _at(self, places: np.ndarray) -> pa.StringArray:
        return self._ids.take(pa.array(np.asarray(self._order)[places]))

    def _row(self, wanted: bytes, low: int, high: int) -> int:
        """Row of an ID in a range of positions; -1 if it is not there."""
        order = self._order
        if high > low + 1:
            low = bisect_left(order, wanted, low, min(high, len(order)), key=self._bytes)
        return order[low] if low < len(order) and self._bytes(order[low]) == wanted else -1

    def _bytes(self, row: int) -> bytes:
        return self._data[self._starts[row] : self._starts[row + 1]].tobytes()


def _heads(ids: pa.StringArray, shared: int, rows: np.ndarray) -> np.ndarray:
    """The 8 bytes behind the ``shared`` first, uint64 [rows]; zeros where an ID ends before."""
    _, offsets, buffer = ids.buffers()
    starts = np.frombuffer(offsets, np.int32)[ids.offset :]
    data = np.frombuffer(buffer, np.uint8) if buffer else np.zeros(1, np.uint8)
    begin, end = starts[rows].astype(np.int64) + shared, starts[rows + 1]
    heads = np.zeros(len(rows), np.uint64)
    for byte in range(HEAD_BYTES):
        at = begin + byte
        byte_or_0 = np.where(at < end, data[np.minimum(at, len(data) - 1)], 0)
        heads = (heads << np.uint64(8)) | byte_or_0.astype(np.uint64)
    return heads


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
