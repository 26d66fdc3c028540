"""What a set of semantic IDs is like: how many are shared, and how much of each level is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

NEIGHBOUR_SAMPLE = 5_000


@dataclass(frozen=True)
class Report:
    """Counts over items and their semantic IDs.

    Attributes:
        unique_share: share of the items that are alone on their ID.
        largest_group: most items on one ID.
        group_sizes: number of items on an ID → number of such IDs.
        codes_used: per level, how many codes some item has.
    """

    items: int
    codebook_sizes: list[int]
    distinct_ids: int
    unique_share: float
    items_sharing: int
    largest_group: int
    group_sizes: dict[int, int]
    codes_used: list[int]

    @classmethod
    def of(cls, codes: np.ndarray, codebook_sizes: Sequence[int]) -> Report:
        """Describe codes [items, L], of which there must be some."""
        _, sizes = np.unique(codes, axis=0, return_counts=True)
        alone = int((sizes == 1).sum())
        return cls(
            items=len(codes),
            codebook_sizes=[int(size) for size in codebook_sizes],
            distinct_ids=len(sizes),
            unique_share=alone / len(codes),
            items_sharing=len(codes) - alone,
            largest_group=int(sizes.max()),
            group_sizes={
                int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)
            },
            codes_used=[len(np.unique(column)) for column in codes.T],
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def neighbour_prefixes(features: np.ndarray, codes: np.ndarray, seed: int = 0) -> list[float]:
    """Per level l, the share of items whose nearest item in feature space has the same first l codes.

    Of more than ``NEIGHBOUR_SAMPLE`` items so many are drawn; their nearest are sought among all.
    """
    from sklearn.neighbors import NearestNeighbors

    if len(features) < 2:
        return [0.0] * codes.shape[1]
    rows = np.arange(len(features))
    if len(rows) > NEIGHBOUR_SAMPLE:
        rows = np.random.default_rng(seed).choice(rows, NEIGHBOUR_SAMPLE, replace=False)
    found = NearestNeighbors(n_neighbors=2).fit(features).kneighbors(features[rows], return_distance=False)
    # an item is its own nearest, unless another lies at the same place
    nearest = np.where(found[:, 0] == rows, found[:, 1], found[:, 0])
    same = np.logical_and.accumulate(codes[nearest] == codes[rows], axis=1)
    return [round(float(share), 4) for share in same.mean(axis=0)]


def table(before: Report, after: Report, neighbours: Sequence[float] = ()) -> Table:
    """Report of the nearest codes beside that after resolution; ``neighbours`` as in ``neighbour_prefixes``."""
    from rich.table import Table

    shown = Table(title=f"Semantic IDs of {after.items:,} items")
    for heading in ("", "nearest codes", "resolved"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for label, values in {
        "distinct IDs": [f"{report.distinct_ids:,}" for report in (before, after)],
        "items alone on their ID": [f"{report.unique_share:.2%}" for report in (before, after)],
        "largest group": [f"{report.largest_group:,}" for report in (before, after)],
    }.items():
        shown.add_row(label, *values)
    for level, size in enumerate(after.codebook_sizes):
        counts = [report.codes_used[level : level + 1] for report in (before, after)]  # one level may have been added
        used = [f"{count[0]:,} of {size:,}" if count else "" for count in counts]
        shown.add_row(f"codes used, level {level + 1}", *used)
    for level, share in enumerate(neighbours):
        shown.add_row(f"nearest item shares {level + 1} code{'s' * (level > 0)}", "", f"{share:.2%}")
    return shown
