"""Combinations of segments as the beam search needs them: how many of the first m semantic IDs have an item in it.

The difference of two such ranks says whether a range of semantic IDs, a prefix, leads to an item of the combination:
two loads, however many items. An array is made from the bitmaps, on the device, when a combination is first asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_RANKS = 1 << 28  # numbers of all arrays together, 1 GiB: 26 combinations of 10 million semantic IDs
MAX_COMBINATIONS = 64

Places = tuple[tuple[int, ...], tuple[int, ...]]  # of the segments an item must be in, and of those it must not be in


class SegmentRanks:
    """Rank arrays of the combinations asked for last, in one buffer whose address never changes.

    Everything is enqueued on the current stream and waits for nothing.

    Args:
        bits: a segment each, as in `Segments`.
        first_row: [M + 1], where each semantic ID's rows begin.
    """

    def __init__(self, bits: Sequence[np.ndarray], first_row: np.ndarray, device: torch.device | str) -> None:
        self.bits_SB = torch.from_numpy(np.stack(bits)).to(device)
        self.first_row = torch.from_numpy(first_row.astype(np.int32)).to(device)
        self.num_items, self.size = int(first_row[-1]), len(first_row)
        self.num_slots = _num_slots(self.size)
        self.ranks = torch.zeros(self.num_slots * self.size, dtype=torch.int32, device=device)
        self._slots: OrderedDict[Places, int] = OrderedDict()  # the one asked for last at the end
        self._in_use: set[Places] = set()
        self.combine(((0,), ()), self.ranks[: self.size])  # loads its kernels, and takes its memory, now and not later

    def new_step(self) -> None:
        """From here on, arrays that were placed before may be replaced."""
        self._in_use.clear()

    def place(self, combination: Places) -> int | None:
        """Where in ``ranks`` its array begins; None if the combinations of this step fill all of the buffer."""
        slot = self._slots.get(combination)
        if slot is None:
            slot = self._free_slot()
            if slot is None:
                return None
            self.combine(combination, self.ranks[slot * self.size :][: self.size])
            self._slots[combination] = slot
        self._slots.move_to_end(combination)
        self._in_use.add(combination)
        return slot * self.size

    def array(self, combination: Places) -> Tensor:
        """Its array, int32 [M + 1], until the next step."""
        at = self.place(combination)
        if at is None:
            return self.combine(combination, torch.empty_like(self.ranks[: self.size]))
        return self.ranks[at : at + self.size]

    def combine(self, combination: Places, out: Tensor) -> Tensor:
        """Compute an array into ``out``: 12 bytes an item for a moment."""
        all_of, none_of = combination
        taken_B = torch.full_like(self.bits_SB[0], 255)
        for place in all_of:
            taken_B &= self.bits_SB[place]
        for place in none_of:
            taken_B &= ~self.bits_SB[place]
        shifts = torch.arange(8, dtype=torch.uint8, device=taken_B.device)
        taken = ((taken_B[:, None] >> shifts) & 1).flatten()[: self.num_items]
        before = torch.zeros(self.num_items + 1, dtype=torch.int32, device=taken.device)
        torch.cumsum(taken, 0, dtype=torch.int32, out=before[1:])
        before = before.index_select(0, self.first_row)
        out[0] = 0
        torch.cumsum(before[1:] > before[:-1], 0, dtype=torch.int32, out=out[1:])
        return out

    def _free_slot(self) -> int | None:
        if len(self._slots) < self.num_slots:
            return len(self._slots)
        oldest = next((combination for combination in self._slots if combination not in self._in_use), None)
        return None if oldest is None else self._slots.pop(oldest)


def ranks_bytes(size: int) -> int:
    """Of the buffer for arrays of ``size`` numbers, one more than there are semantic IDs."""
    return 4 * size * _num_slots(size)


def _num_slots(size: int) -> int:
    return max(2, min(MAX_COMBINATIONS, MAX_RANKS // size))
