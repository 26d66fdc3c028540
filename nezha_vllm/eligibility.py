"""Which items a request may get: as rows of the catalogue, and as positions among its semantic IDs for the search.

Several items may share a semantic ID. An ID is eligible as long as one of its items is, so an excluded item never hides
another; the excluded ones are left out when IDs become items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nezha_vllm.catalogue import Catalogue


@dataclass(frozen=True)
class Eligibility:
    """Eligible are the listed rows and IDs alone if ``only``, else all but them.

    ``rows`` int64 and ``positions`` int32, both ascending and without repeats. With ``only``, ``positions`` has the IDs
    of which some item is eligible; else those of which none is.
    """

    only: bool
    rows: np.ndarray
    positions: np.ndarray

    def keeps(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of the rows is eligible."""
        at = np.searchsorted(self.rows, rows)
        listed = np.zeros(len(rows), bool)
        inside = at < len(self.rows)
        listed[inside] = self.rows[at[inside]] == rows[inside]
        return listed == self.only


def eligibility(catalogue: Catalogue, allowed: np.ndarray | None, excluded: np.ndarray) -> Eligibility | None:
    """Eligible are the ``allowed`` rows (None: all) without the ``excluded``; None if that leaves out nothing."""
    if allowed is not None:
        rows = np.setdiff1d(allowed, excluded).astype(np.int64)
        return Eligibility(True, rows, np.unique(positions_of(catalogue, rows)).astype(np.int32))
    if len(excluded) == 0:
        return None
    rows = np.unique(excluded).astype(np.int64)
    positions, counts = np.unique(positions_of(catalogue, rows), return_counts=True)
    whole = counts == catalogue.first_row[positions + 1] - catalogue.first_row[positions]
    return Eligibility(False, rows, positions[whole].astype(np.int32))


def positions_of(catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
    """Position among the keys of each row's semantic ID."""
    return np.searchsorted(catalogue.first_row, rows, side="right") - 1


def rows_of_positions(catalogue: Catalogue, positions: np.ndarray) -> np.ndarray:
    """All rows of the semantic IDs at these positions."""
    spans = [np.arange(catalogue.first_row[at], catalogue.first_row[at + 1]) for at in positions]
    return np.concatenate(spans) if spans else np.empty(0, np.int64)
