"""From ranked semantic IDs to ranked items, where several items share an ID and a score."""

from __future__ import annotations

import numpy as np

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.eligibility import Eligibility


def ranked_rows(
    catalogue: Catalogue,
    positions: np.ndarray,
    n: int,
    *,
    policy: str = "expand",
    max_per_id: int | None = None,
    eligible: Eligibility | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first n items of ranked semantic IDs: their rows, and for each the rank of its ID.

    Args:
        positions: of the IDs among the catalogue's keys, best first.
        policy: ``expand`` gives all items of an ID before those of the next, ``first`` one item an ID, ``round_robin``
            every ID's first item, then every ID's second, and so on. Items of an ID come by weight.
        max_per_id: at most so many items of an ID, None for all.
        eligible: others are passed over.
    """
    most = 1 if policy == "first" else n if max_per_id is None else min(n, max_per_id)
    first_rows = catalogue.first_row[positions]
    counts = catalogue.first_row[positions + 1] - first_rows
    if eligible is None:
        counts = np.minimum(counts, most)
    ranks = np.repeat(np.arange(len(counts)), counts)
    rows = (first_rows - np.cumsum(counts) + counts)[ranks] + np.arange(len(ranks))
    if eligible is not None:
        kept = eligible.keeps(rows)
        rows, ranks = rows[kept], ranks[kept]
    turns = np.arange(len(ranks)) - np.searchsorted(ranks, ranks)
    if eligible is not None:
        rows, ranks, turns = rows[turns < most], ranks[turns < most], turns[turns < most]
    if policy == "round_robin":
        order = np.argsort(turns, kind="stable")
        rows, ranks = rows[order], ranks[order]
    return rows[:n], ranks[:n]
