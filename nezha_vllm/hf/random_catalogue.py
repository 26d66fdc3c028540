"""A catalogue of random items with distinct semantic IDs, for speed runs and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.runs import distinct
from nezha_vllm.semantic_id import SemanticIdCodec


def random_catalogue(num_items: int, codebook_sizes: Sequence[int], seed: int = 0) -> Catalogue:
    """Items ``0`` … on distinct, uniformly drawn semantic IDs. Raises ``ValueError`` if there are not enough IDs."""
    codec = SemanticIdCodec(codebook_sizes)
    if not 1 <= num_items <= codec.capacity:
        raise ValueError(f"cannot place {num_items} items on {codec.capacity} semantic IDs {codec.codebook_sizes}")
    generator = np.random.default_rng(seed)
    if codec.capacity <= 4 * num_items:
        keys = generator.permutation(codec.capacity)[:num_items]
    else:
        keys = np.empty(0, np.int64)
        while len(keys) < num_items:
            keys = distinct(np.append(keys, generator.integers(0, codec.capacity, num_items)))
        keys = generator.permutation(keys)[:num_items]
    item_ids = pa.array(np.arange(num_items)).cast(pa.string())
    return Catalogue.build(item_ids, codec.codes_of_key(keys), codec.codebook_sizes)
