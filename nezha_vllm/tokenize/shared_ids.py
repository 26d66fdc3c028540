"""Resolution of shared semantic IDs by optimal assignment at the last level, or by one more level.

Items with one prefix of L - 1 codes compete for the T_L codes of the last level. Where some of them share one, the
group's last codes are dealt anew so that all differ and the sum of squared distances to the codes' centres is least.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def resolve(codes: np.ndarray, cost_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Codes [items, L] with as few shared IDs as the prefixes allow; the first L - 1 levels stay.

    Args:
        cost_of: rows [m] → cost [m, T_L] of giving each of these items each last code. Asked a group at a time: the
            whole matrix of 100,000 items and 8,192 codes would take 3 GB.

    A group of m items with one prefix ends with min(m, T_L) distinct IDs and ceil(m / T_L) items on the fullest.
    Groups without a shared ID are left alone.
    """
    resolved = codes.copy()
    _, group_of, sizes = np.unique(codes[:, :-1], axis=0, return_inverse=True, return_counts=True)
    rows_by_group = np.split(np.argsort(group_of.reshape(-1), kind="stable"), np.cumsum(sizes)[:-1])
    for rows in rows_by_group:
        if len(np.unique(codes[rows, -1])) < len(rows):
            resolved[rows, -1] = _deal(cost_of(rows))
    return resolved


def extra_level(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Codes [items, L] → [items, L + 1]: the items of one ID are numbered, the heaviest has 0.

    Where no ID is shared, the codes as they are.
    """
    _, group_of, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    if sizes.max() == 1:
        return codes
    order = np.lexsort((-np.asarray(weights), group_of.reshape(-1)))
    numbers = np.empty(len(codes), np.int64)
    numbers[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.column_stack([codes, numbers])


def _deal(cost: np.ndarray) -> np.ndarray:
    """Last codes of one group: rounds of one item a code until every item has one."""
    from scipy.optimize import linear_sum_assignment

    dealt = np.full(len(cost), -1, np.int64)
    waiting = np.arange(len(cost))
    while len(waiting):
        item, code = linear_sum_assignment(cost[waiting])
        dealt[waiting[item]] = code
        waiting = np.delete(waiting, item)
    return dealt
