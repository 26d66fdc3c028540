"""Hit rate and NDCG at k on ranks of items, one relevant item a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTOFFS = (5, 10)
DEEP_CUTOFF = 500  # of Hit alone: what a ranking stage behind would get
UNRANKED = np.iinfo(np.int64).max


def hits(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 for targets among the first k, else 0; ranks count from 0, ``UNRANKED`` stands for items not returned."""
    return (ranks < k).astype(np.float64)


def gains(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(rank + 2) for targets among the first k, else 0: with one relevant item the ideal is 1."""
    return np.where(ranks < k, 1.0 / np.log2(np.minimum(ranks, k) + 2.0), 0.0)


def hit(ranks: np.ndarray, k: int) -> float:
    """Mean of ``hits``."""
    return float(hits(ranks, k).mean())


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Mean of ``gains``."""
    return float(gains(ranks, k).mean())


def summary(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """``hit@5``, ``hit@10``, ``ndcg@5``, ``ndcg@10``."""
    return {f"hit@{k}": hit(ranks, k) for k in cutoffs} | {f"ndcg@{k}": ndcg(ranks, k) for k in cutoffs}


def ranks_of(targets: Sequence[str], lists: Sequence[Sequence[str]]) -> np.ndarray:
    """Rank of each target in its list, from 0; ``UNRANKED`` where it is absent."""
    found = [items.index(target) if target in items else UNRANKED for target, items in zip(targets, lists, strict=True)]
    return np.asarray(found, np.int64)


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """``p50_ms`` and ``p99_ms``."""
    return {f"p{part}_ms": round(float(np.percentile(milliseconds, part)), 3) for part in (50, 99)}
