"""Mixed-radix arithmetic on semantic IDs.

A semantic ID is a tuple of codes (t_1 … t_L) with 0 ≤ t_l < T_l. Two integers stand for it:

* the *public integer* ``V = Σ_l t_l · Π_{j<l} T_j`` (level 1 least significant; NEZHA, section on verification),
* the *key*, the same digits with level 1 most significant. In key order every prefix is one contiguous range, so
  sorted arrays of keys answer prefix questions by binary search. Inside the project, arrays are in key order.

Everything here works on NumPy arrays (and what NumPy makes one of) and on torch tensors alike and keeps their device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

LEVEL_NAMES = "abcdefghijklmnopqrstuvwxyz"
SHARED_ID_POLICIES = ("expand", "first", "round_robin")  # how items of one semantic ID come out, see ``sharing``
SOFTMAX_OVER = ("codes", "catalogue")  # see ``config.NezhaFields``, whose module takes seconds to import


def code_token(level: int, code: int) -> str:
    """Text of a code's token: ``<a_12>`` is code 12 of level 0."""
    return f"<{LEVEL_NAMES[level]}_{code}>"


def placeholder_token(level: int) -> str:
    """Text of a level's placeholder: ``<sp_1>`` belongs to level 0."""
    return f"<sp_{level + 1}>"


@dataclass(frozen=True)
class SemanticIdCodec:
    """Codec between codes [..., L], keys [...] and public integers [...], all int64.

    Raises ``ValueError`` if there are no levels, a size is no positive integer, or Π T_l ≥ 2^63.
    """

    codebook_sizes: tuple[int, ...]

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        try:
            sizes = tuple(operator.index(size) for size in codebook_sizes)
        except TypeError:
            raise ValueError(f"codebook sizes must be a list of integers, got {codebook_sizes!r}") from None
        object.__setattr__(self, "codebook_sizes", sizes)
        if not 1 <= self.num_levels <= len(LEVEL_NAMES):
            raise ValueError(f"a semantic ID has 1 to {len(LEVEL_NAMES)} levels, got {self.num_levels}")
        if min(self.codebook_sizes) < 1:
            raise ValueError(f"every codebook size must be at least 1, got {self.codebook_sizes}")
        if self.capacity >= 2**63:
            raise ValueError(
                f"codebook sizes {self.codebook_sizes} span 2^{math.log2(self.capacity):.1f} semantic IDs, "
                "which does not fit a signed 64-bit integer; use fewer levels or smaller codebooks (product below 2^63)"
            )

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @cached_property
    def capacity(self) -> int:
        """Number of distinct semantic IDs, Π T_l."""
        return math.prod(self.codebook_sizes)

    @cached_property
    def suffix_sizes(self) -> tuple[int, ...]:
        """Per level l, the number of keys below one prefix of l + 1 codes: Π_{j>l} T_j."""
        return tuple(math.prod(self.codebook_sizes[level + 1 :]) for level in range(self.num_levels))

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.codebook_sizes[:level]) for level in range(self.num_levels))

    def check_codes(self, codes: Any) -> None:
        """Raise ``ValueError`` naming the first code that is out of range or the wrong number of levels."""
        if codes.shape[-1] != self.num_levels:
            raise ValueError(f"expected {self.num_levels} codes per semantic ID, got {codes.shape[-1]}")
        for level, size in enumerate(self.codebook_sizes):
            column = codes[..., level].reshape(-1)
            wrong = (column < 0) | (column >= size)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0][0])
                raise ValueError(
                    f"code {int(column[row])} of level {level + 1} in row {row} is out of range: "
                    f"that level has codes 0 to {size - 1}"
                )

    def encode(self, codes: Any) -> Any:
        """Codes [..., L] → public integers V [...]."""
        return self._weighted_sum(codes, self._strides)

    def key(self, codes: Any) -> Any:
        """Codes [..., L] → keys [...]."""
        return self._weighted_sum(codes, self.suffix_sizes)

    def decode(self, integers: Any) -> Any:
        """Public integers V [...] → codes [..., L]."""
        return self._digits(integers, self._strides)

    def codes_of_key(self, keys: Any) -> Any:
        """Keys [...] → codes [..., L]."""
        return self._digits(keys, self.suffix_sizes)

    def _weighted_sum(self, codes: Any, weights: tuple[int, ...]) -> Any:
        codes = _int64(codes)
        self.check_codes(codes)
        return sum(codes[..., level] * weight for level, weight in enumerate(weights))

    def _digits(self, integers: Any, weights: tuple[int, ...]) -> Any:
        integers = _int64(integers)
        if bool(((integers < 0) | (integers >= self.capacity)).any()):
            raise ValueError(
                f"an integer is outside 0 … {self.capacity - 1}, the range of codebooks {self.codebook_sizes}"
            )
        digits = [integers // weight % size for weight, size in zip(weights, self.codebook_sizes, strict=True)]
        if isinstance(integers, np.ndarray):
            return np.stack(digits, axis=-1)
        import torch

        return torch.stack(digits, dim=-1)


def _int64(values: Any) -> Any:
    """Integers as an int64 tensor or array: in a narrower type, products and comparisons with Π T_l would overflow."""
    is_tensor = hasattr(values, "is_floating_point")
    values = values if is_tensor else np.asarray(values)
    if values.is_floating_point() if is_tensor else values.dtype.kind not in "iu":
        raise ValueError(f"codes and semantic IDs must be integers, got {values.dtype}")
    return values.long() if is_tensor else values.astype(np.int64)
