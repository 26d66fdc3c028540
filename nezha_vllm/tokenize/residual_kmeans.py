"""Residual k-means: level 1 clusters the items, every further level clusters what the levels before left over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Up to here Lloyd's full k-means takes seconds; beyond, mini-batches do.
FULL_KMEANS_ITEMS = 50_000


@dataclass(frozen=True)
class Quantized:
    """Codes int64 [items, L]; centres of each level [at most T_l, F]; residuals [items, F] before the last one."""

    codes: np.ndarray
    centres: list[np.ndarray]
    last_residual: np.ndarray

    def last_level_cost(self, rows: np.ndarray) -> np.ndarray:
        """Squared distance [rows, codes] of these items' last residuals to the last level's centres."""
        from sklearn.metrics.pairwise import euclidean_distances

        return euclidean_distances(self.last_residual[rows], self.centres[-1], squared=True)

    def variance_kept(self, features: np.ndarray, codes: np.ndarray) -> float:
        """1 - squared distance of the items to the sum of their codes' centres, over the features' variance."""
        residual = features - sum(centre[column] for centre, column in zip(self.centres, codes.T, strict=True))
        total = float((features**2).sum())
        return 1 - float((residual**2).sum()) / total if total else 1.0


def residual_kmeans(
    features: np.ndarray,
    codebook_sizes: Sequence[int],
    *,
    seed: int = 0,
    on_level: Callable[[int], None] = lambda level: None,
) -> Quantized:
    """Quantise features [items, F]; deterministic by ``seed``. ``on_level(l)`` is called when a level is done.

    A codebook larger than the number of items keeps its surplus codes unused.
    """
    residual = np.asarray(features, np.float32)
    if residual.ndim != 2 or not len(residual) or not np.isfinite(residual).all():
        raise ValueError("features must be finite numbers [items, F] with at least one item")
    columns, centres = [], []
    before_last = residual
    for level, size in enumerate(codebook_sizes):
        before_last = residual
        code, centre = _kmeans(residual, int(size), seed + level)
        residual = residual - centre[code]
        columns.append(code)
        centres.append(centre)
        on_level(level)
    return Quantized(np.stack(columns, axis=1).astype(np.int64), centres, before_last)


def _kmeans(points: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    clusters = min(size, len(points))
    if len(points) <= FULL_KMEANS_ITEMS:
        model = KMeans(clusters, n_init=1, random_state=seed)
    else:
        model = MiniBatchKMeans(clusters, n_init=1, batch_size=16_384, max_iter=50, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct points than clusters is no fault here: the report counts the codes in use.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(points)
    return model.labels_, model.cluster_centers_.astype(np.float32)
