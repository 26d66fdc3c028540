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
MAX_SPACED_BITS = 16  # of the number of heads that a search of many begins with: they stay in a core's cache
AT_ONCE = 1 << 20  # rows, while tags are made


class UnknownItemError(KeyError):
    """An item ID that the catalogue does not hold."""

    def __str__(self) -> str:
        return f"item {self.args[0]!r} is not in the catalogue"


def index_bytes(items: int) -> int:
    """At most, what the index of so many has of its own."""
    return 8 * min(items, MAX_HEADS) + (items if items > MAX_HEADS else 0)


class ItemIndex:
    """Finds IDs by a binary search that takes its first steps for all of them at once.

    All IDs begin with the same ``shared`` bytes, often none. The 8 bytes behind these, as big-endian integers, ascend
    with the IDs: NumPy narrows each ID down to the few that share its 8 bytes. What is left is compared by Python, or
    for many IDs by Arrow, a step of the search for all of them at once. Where not every item has its 8 bytes in the
    index, each has a tag there, one byte: without it, each step would be three reads that miss the cache, 0.1 µs each.

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
        self._spacing = 1 << max(0, len(self._heads).bit_length() - MAX_SPACED_BITS)
        self._spaced = self._heads[:: self._spacing].copy()
        self._tags = self._tags_by_id() if self._stride > 1 else np.empty(0, np.uint8)

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
        heads = _heads(wanted, self._shared)
        sort = np.argsort(heads)  # neighbours lie in the same pages
        heads, wanted = heads[sort], wanted.take(pa.array(sort))
        at, end = self._ranges(heads)
        places, some = self._candidates(heads, at, np.minimum(end, len(self._order)))
        same = self._equal(places, wanted)
        if len(others := np.flatnonzero(some & ~same)):  # some share their 8 bytes, or their tag, with another ID
            wanted = wanted.take(pa.array(others))
            places[others] = self._bisected(wanted, at[others], end[others])
            same[others] = self._equal(places[others], wanted)
        rows = np.empty(len(sort), np.int64)
        rows[sort] = np.where(same, np.asarray(self._order)[places], -1)
        return rows

    def _ranges(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of places in order of the IDs where those with these heads may be, first and last but one."""
        first = np.searchsorted(self._heads, heads) if len(heads) <= FEW else self._first(heads)
        last = first + (self._heads[np.minimum(first, len(self._heads) - 1)] == heads)
        several = np.flatnonzero(self._heads[np.minimum(last, len(self._heads) - 1)] == heads)
        last[several] = np.searchsorted(self._heads, heads[several], "right")
        return np.maximum((first - 1) * self._stride + 1, 0), last * self._stride

    def _first(self, heads: np.ndarray) -> np.ndarray:
        """`np.searchsorted` over all heads, which takes its steps one by one: 3 ms for 10,000 among 5 million."""
        step, found = self._spacing, np.searchsorted(self._spaced, heads)
        before = np.where(found > 0, (found - 1) * step, -1)  # the last place known to have a smaller head
        while step := step // 2:
            at = np.minimum(before + step, len(self._heads) - 1)
            before += step * (self._heads[at] < heads)
        return np.minimum(before, len(self._heads) - 1) + 1

    def _candidates(self, heads: np.ndarray, at: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first place of each range that may have the ID, and whether there is one."""
        if self._stride == 1:
            return np.minimum(at, len(self._order) - 1), at < end
        windows = np.lib.stride_tricks.sliding_window_view(self._tags, 2 * self._stride)
        equal = windows[at] == _tags(heads)[:, None]
        first = equal.argmax(1)
        some = equal[np.arange(len(at)), first] & (at + first < end)
        return np.minimum(at + first, len(self._order) - 1), some | (end - at > 2 * self._stride)

    def _tags_by_id(self) -> np.ndarray:
        """The tag of each place, and zeros behind. In the order of the rows first: their IDs lie side by side."""
        count = len(self._order)
        parts = [slice(first, first + AT_ONCE) for first in range(0, count, AT_ONCE)]
        by_row = np.concatenate([_tags(_heads(self._ids, self._shared, part)) for part in parts])
        return np.append(by_row[np.asarray(self._order)], np.zeros(2 * self._stride, np.uint8))

    def _bisected(self, wanted: pa.StringArray, at: np.ndarray, end: np.ndarray) -> np.ndarray:
        """A place that has the ID if one of its range does."""
        end = np.minimum(end, len(self._order) - 1)
        while len(open_ := np.flatnonzero(at < end)):
            middle = (at[open_] + end[open_]) // 2
            smaller = pc.less(self._at(middle), wanted.take(pa.array(open_))).to_numpy(zero_copy_only=False)
            at[open_[smaller]] = middle[smaller] + 1
            end[open_[~smaller]] = middle[~smaller]
        return at

    def _equal(self, places: np.ndarray, wanted: pa.StringArray) -> np.ndarray:
        return pc.equal(self._at(places), wanted).to_numpy(zero_copy_only=False)

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


def _heads(ids: pa.StringArray, shared: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """The 8 bytes behind the ``shared`` first, uint64 [rows]; zeros where an ID ends before."""
    _, offsets, buffer = ids.buffers()
    starts = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(buffer, np.uint8) if buffer else np.empty(0, np.uint8)
    if len(data) < HEAD_BYTES:
        data = np.append(data, np.zeros(HEAD_BYTES, np.uint8))
    words = np.ndarray(len(data) - HEAD_BYTES + 1, ">u8", data, strides=(1,))  # one at each byte
    begin = starts[:-1][rows].astype(np.int64) + shared
    kept = np.clip(starts[1:][rows] - begin, 0, HEAD_BYTES)
    at = np.minimum(begin, len(words) - 1)  # at the end of all, the word in front of it
    heads = words[at].astype(np.uint64) << (8 * (begin - at)).astype(np.uint64)
    return heads & _FIRST_BYTES[kept]


def _tags(heads: np.ndarray) -> np.ndarray:
    """A byte of each head's hash."""
    return ((heads * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


# masks of the first 0 to 8 bytes
_FIRST_BYTES = np.array([(1 << 64) - (1 << 8 * (HEAD_BYTES - kept)) for kept in range(HEAD_BYTES + 1)], np.uint64)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
