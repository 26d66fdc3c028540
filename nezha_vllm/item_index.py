"""Item IDs ↔ rows, read where they lie: in the buffers of a memory-mapped Arrow column, without an object an item."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

HEAD_BYTES = 8
MAX_HEADS = 1 << 23  # 64 MB a process; beyond 8 million items, every 2nd, 3rd … has one


class UnknownItemError(KeyError):
    """An item ID that the catalogue does not hold."""

    def __str__(self) -> str:
        return f"item {self.args[0]!r} is not in the catalogue"


class ItemIndex:
    """Finds IDs by a binary search that takes its first steps for all of them at once.

    All IDs begin with the same ``shared`` bytes, often none. The 8 bytes behind these, as big-endian integers, ascend
    with the IDs: NumPy narrows each ID down to the few that share its 8 bytes, and Python compares what is left.

    Args:
        ids: one ID a row.
        rows_by_id: int64 [rows], rows in order of their IDs' UTF-8 bytes.
    """

    def __init__(self, ids: pa.StringArray, rows_by_id: np.ndarray) -> None:
        _, offsets, data = ids.buffers()
        self._starts = memoryview(offsets).cast("i")[ids.offset : ids.offset + len(ids) + 1]
        self._data = memoryview(data).cast("B")
        self._order = np.ascontiguousarray(rows_by_id).data  # its elements are Python's integers
        first, last = self._bytes(self._order[0]), self._bytes(self._order[-1])
        self._shared = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        self._stride = -(-len(ids) // MAX_HEADS)
        self._heads = self._heads_of(np.asarray(rows_by_id)[:: self._stride])

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
        # surrogatepass: an ID that is no proper Unicode is unknown, not a crash
        wanted = [item_id.encode("utf-8", "surrogatepass") for item_id in item_ids]
        begin, end = self._shared, self._shared + HEAD_BYTES  # whether it begins like all IDs is seen at the end
        integers = [int.from_bytes(item[begin:end].ljust(HEAD_BYTES, b"\0"), "big") for item in wanted]
        heads = np.array(integers, np.uint64)
        lows = np.maximum((np.searchsorted(self._heads, heads, "left") - 1) * self._stride + 1, 0)
        highs = np.searchsorted(self._heads, heads, "right") * self._stride
        return list(map(self._row, wanted, lows.tolist(), highs.tolist()))

    def _row(self, wanted: bytes, low: int, high: int) -> int:
        """Row of an ID in a range of positions; -1 if it is not there."""
        order = self._order
        if high > low + 1:
            low = bisect_left(order, wanted, low, min(high, len(order)), key=self._bytes)
        return order[low] if low < len(order) and self._bytes(order[low]) == wanted else -1

    def _bytes(self, row: int) -> bytes:
        return self._data[self._starts[row] : self._starts[row + 1]].tobytes()

    def _heads_of(self, rows: np.ndarray) -> np.ndarray:
        starts, data = np.asarray(self._starts), np.asarray(self._data)
        begin, end = starts[rows].astype(np.int64) + self._shared, starts[rows + 1]
        heads = np.zeros(len(rows), np.uint64)
        for byte in range(HEAD_BYTES):
            at = begin + byte
            byte_or_0 = np.where(at < end, data[np.minimum(at, len(data) - 1)], 0)
            heads = (heads << np.uint64(8)) | byte_or_0.astype(np.uint64)
        return heads
