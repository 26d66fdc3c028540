"""What differs between two catalogues, item by item, without a Python object an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.segments import Segments


@dataclass(frozen=True)
class Difference:
    """Rows of items: ``removed`` counts in the old catalogue, the others in the new one, all ascending."""

    added: np.ndarray
    removed: np.ndarray
    moved: np.ndarray
    reweighted: np.ndarray
    regrouped: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in vars(self).items()}


def difference(old: Catalogue, new: Catalogue) -> Difference:
    """Items added, removed, moved (their codes changed), with another weight, and in other segments."""
    row_in_new = _rows_in(new, old)
    known = row_in_new >= 0
    old_rows, new_rows = np.nonzero(known)[0], row_in_new[known]
    is_added = np.ones(new.num_items, bool)
    is_added[new_rows] = False
    if old.codec.num_levels == new.codec.num_levels:
        has_moved = (old.codes[old_rows] != new.codes[new_rows]).any(axis=1)
    else:
        has_moved = np.ones(len(new_rows), bool)
    reweighted = old.weights[old_rows] != new.weights[new_rows]
    return Difference(
        added=np.nonzero(is_added)[0],
        removed=np.nonzero(~known)[0],
        moved=np.sort(new_rows[has_moved]),
        reweighted=np.sort(new_rows[reweighted]),
        regrouped=np.sort(new_rows[_regrouped(old.segments, old_rows, new.segments, new_rows)]),
    )


def _regrouped(old: Segments, old_rows: np.ndarray, new: Segments, new_rows: np.ndarray) -> np.ndarray:
    """Whether each item is in a segment on one side alone; a segment that a side lacks has no items there."""
    found = np.zeros(len(new_rows), bool)
    for name in {*old.names, *new.names}:
        found |= old.holds(name, old_rows) != new.holds(name, new_rows)
    return found


def lost_share(old: Catalogue, new: Catalogue) -> float:
    """Share of the old catalogue's items that the new one lacks."""
    return float((_rows_in(new, old) < 0).mean())


def examples(catalogue: Catalogue, rows: np.ndarray, count: int) -> Sequence[str]:
    """IDs of a few of the rows, spread over all."""
    picked = rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return catalogue.item_ids(picked.tolist())


def _rows_in(catalogue: Catalogue, asked: Catalogue) -> np.ndarray:
    """For each row of ``asked`` the row of the same item in ``catalogue``, -1 where there is none."""
    found: pa.Array = pc.index_in(asked.ids, value_set=catalogue.ids)
    return found.fill_null(-1).to_numpy(zero_copy_only=False)
