"""Hit rate and NDCG at k on ranks of items, one relevant item a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUTOFFS = (5, 10)
UNRANKED = np.iinfo(np.int64).max


def hit(ranks: np.ndarray, k: int) -> float:
    """Share of targets among the first k; ranks count from 0, ``UNRANKED`` stands for items not returned."""
    return float((ranks < k).mean())


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Mean of 1 / log2(rank + 2) over targets among the first k, else 0: with one relevant item the ideal is 1."""
    return float(np.where(ranks < k, 1.0 / np.log2(np.minimum(ranks, k) + 2.0), 0.0).mean())


def summary(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """``hit@5``, ``hit@10``, ``ndcg@5``, ``ndcg@10``."""
    return {f"hit@{k}": hit(ranks, k) for k in cutoffs} | {f"ndcg@{k}": ndcg(ranks, k) for k in cutoffs}


def ranks_of(targets: Sequence[str], lists: Sequence[Sequence[str]]) -> np.ndarray:
    """Rank of each target in its list, from 0; ``UNRANKED`` where it is absent."""
    found = [items.index(target) if target in items else UNRANKED for target, items in zip(targets, lists, strict=True)]
    return np.asarray(found, np.int64)
