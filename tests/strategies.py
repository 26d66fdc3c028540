"""Hypothesis strategies for semantic IDs and catalogues, shared by the property tests."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st


@st.composite
def wide_codebooks(draw: st.DrawFn) -> tuple[int, ...]:
    """1 to 8 unequal sizes with a product anywhere below 2^63, often close to it."""
    sizes, room = [], 2**63 - 1
    for _ in range(draw(st.integers(1, 8))):
        sizes.append(draw(st.one_of(st.integers(1, min(room, 9)), st.integers(1, room), st.just(room))))
        room //= sizes[-1]
    return tuple(draw(st.permutations(sizes)))


def small_codebooks(max_levels: int = 5, max_size: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, max_size), min_size=1, max_size=max_levels).map(tuple)


@st.composite
def code_rows(draw: st.DrawFn, sizes: tuple[int, ...], max_rows: int = 12) -> np.ndarray:
    """Codes [rows, L] within the codebooks, at least one row, repeats allowed."""
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    return np.array(draw(st.lists(row, min_size=1, max_size=max_rows)), dtype=np.int64)


@st.composite
def key_sets(draw: st.DrawFn, sizes: tuple[int, ...], max_keys: int = 3000) -> np.ndarray:
    """Ascending distinct keys of a random catalogue: one item up to thousands, sparse or complete."""
    capacity = math.prod(sizes)
    count = draw(st.one_of(st.integers(1, 6), st.integers(1, max_keys), st.just(max_keys)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if count >= capacity:
        return np.arange(capacity)
    return np.unique(rng.integers(0, capacity, count))
