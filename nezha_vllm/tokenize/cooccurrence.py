"""Items' company in training sequences as vectors: PPMI of co-occurrence in a window, reduced by truncated SVD.

All matrices are sparse: 100,000 items with 50 neighbours each need about 60 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nezha_vllm.data.progress import progress_bars

# Contexts are drawn from frequency ** 0.75, which keeps rare companions from dominating (Levy, Goldberg, Dagan 2015).
CONTEXT_POWER = 0.75


def cooccurrence_counts(sequences: Sequence[Sequence[int]], num_items: int, window: int) -> Any:
    """Symmetric counts, scipy CSR [items, items], of pairs up to ``window`` apart; at distance d one counts 1/d."""
    from scipy.sparse import coo_matrix, csr_matrix

    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    flat = np.fromiter((item for items in sequences for item in items), np.int64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(sequences)), lengths)
    counts = csr_matrix((num_items, num_items), dtype=np.float32)
    for distance in range(1, window + 1):
        left, right = flat[:-distance], flat[distance:]
        pair = (owner[:-distance] == owner[distance:]) & (left != right)
        ones = np.full(int(pair.sum()), 1 / distance, np.float32)
        counts = counts + coo_matrix((ones, (left[pair], right[pair])), counts.shape).tocsr()
    return (counts + counts.T).tocsr()


def ppmi(counts: Any) -> Any:
    """Positive pointwise mutual information of symmetric counts, sparse like them."""
    result = counts.tocoo().astype(np.float64)
    total = result.data.sum()
    if total == 0:
        return counts
    row = np.asarray(counts.sum(axis=1), np.float64).ravel()
    context = row**CONTEXT_POWER
    context /= context.sum()
    result.data = np.maximum(np.log(result.data / (row[result.row] * context[result.col])), 0)
    result.eliminate_zeros()
    return result.tocsr()


def cooccurrence(
    sequences: Sequence[Sequence[int]], num_items: int, *, window: int = 10, dimensions: int = 64, seed: int = 0
) -> np.ndarray:
    """Item vectors float32 [items, at most ``dimensions``], rows of unit length; an item without company is zero.

    ``sequences`` hold item numbers and must be training data only: what they show of held-out items leaks into the
    semantic IDs.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    if window < 1 or dimensions < 1:
        raise ValueError(f"co-occurrence needs a window and dimensions of at least 1, got {window} and {dimensions}")
    with progress_bars() as progress:
        progress.add_task("counting which items keep company", total=None)
        information = ppmi(cooccurrence_counts(sequences, num_items, window))
        rank = min(dimensions, num_items - 1)
        if information.nnz == 0 or rank < 1:
            return np.zeros((num_items, max(rank, 1)), np.float32)
        svd = TruncatedSVD(rank, random_state=seed)
        vectors = svd.fit_transform(information)
    # U √S rather than U S: the leading directions would drown the rest.
    vectors /= np.sqrt(np.maximum(svd.singular_values_, 1e-12))
    return normalize(vectors).astype(np.float32)
