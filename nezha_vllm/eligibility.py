"""Which items a request may get: as rows of the catalogue, and as positions among its semantic IDs for the search.

Several items may share a semantic ID. An ID is eligible as long as one of its items is, so an excluded item never hides
another; the excluded ones are left out when IDs become items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.runs import distinct, starts
from nezha_vllm.segments import Combination


@dataclass(frozen=True)
class Eligibility:
    """Eligible are the listed rows and IDs alone if ``only``, else all but them.

    ``rows`` int64 and ``positions`` int32, both ascending and without repeats. With ``only``, ``positions`` has the IDs
    of which some item is eligible; else those of which none is. With a ``combination`` of segments, never together with
    ``only``, "all" are its items and the IDs that have some, and the listed are some of them.
    """

    only: bool
    rows: np.ndarray
    positions: np.ndarray
    combination: Combination | None = None

    def keeps(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of the rows is eligible."""
        at = np.searchsorted(self.rows, rows)
        listed = np.zeros(len(rows), bool)
        inside = at < len(self.rows)
        listed[inside] = self.rows[at[inside]] == rows[inside]
        kept = listed == self.only
        return kept if self.combination is None else kept & self.combination.holds(rows)


def eligibility(
    catalogue: Catalogue, allowed: np.ndarray | None, excluded: np.ndarray, combination: Combination | None = None
) -> Eligibility | None:
    """Eligible are the ``allowed`` rows (None: all) of the combination without the ``excluded``.

    None if that leaves out nothing.
    """
    if allowed is not None:
        rows = distinct(allowed)
        if len(excluded):
            rows = np.setdiff1d(rows, distinct(excluded), assume_unique=True)
        if combination is not None:
            rows = rows[combination.holds(rows)]
        positions = positions_of(catalogue, rows)
        return Eligibility(True, rows, positions[starts(positions)].astype(np.int32))
    if combination is None and len(excluded) == 0:
        return None
    rows = distinct(excluded)
    if combination is not None:
        rows = rows[combination.holds(rows)]
    positions = positions_of(catalogue, rows)  # ascending, like the rows
    first = starts(positions)
    positions, counts = positions[first], np.diff(np.append(first, len(rows)))
    sizes = catalogue.first_row[positions + 1] - catalogue.first_row[positions]
    if combination is not None and len(positions):
        held = combination.holds(rows_of_positions(catalogue, positions))
        sizes = np.add.reduceat(held, np.cumsum(sizes) - sizes, dtype=np.int64)
    return Eligibility(False, rows, positions[counts == sizes].astype(np.int32), combination)


def positions_of(catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
    """Position among the keys of each row's semantic ID."""
    if catalogue.num_ids == catalogue.num_items:
        return rows
    return np.searchsorted(catalogue.first_row, rows, side="right") - 1


def rows_of_positions(catalogue: Catalogue, positions: np.ndarray) -> np.ndarray:
    """All rows of the semantic IDs at these positions."""
    first = catalogue.first_row[positions]
    counts = catalogue.first_row[positions + 1] - first
    return np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
