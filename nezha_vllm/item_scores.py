"""What an item itself is worth to a user, beside its codes: the product of h_0 and the item's vector.

Codes find what a user may want, but say only what items share; which of them this user takes next is learnt by the
vector of the item's token (see ``item_tokens``), by which training predicts it as SASRec does. ``weight`` times the
product counts with the last code, so the beams that a search found are put in order by both, and all behind it stays
as it is.

An item without a token, such as a new one, has the sum of its codes' embeddings, where training starts for all of them,
and what training has then added, in the mean, to the items of its first code. Without that mean it would stand behind
all others: theirs moved to where the users are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nezha_vllm.item_tokens import ItemTokens

WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # training takes the best of them
MAX_ELEMENTS = 1 << 24  # of embeddings gathered in one go


class ItemScores:
    """Of one model, on the device of its ``embeddings`` [V, H], whose last rows are those of item tokens.

    ``keys`` int64 [I], ascending, have the token ids from ``first`` on. Other items are sums of ``code_rows``
    [Σ T_l, H], in which code c of level l is row ``code_starts[l] + c``.
    """

    def __init__(self, tokens: ItemTokens, embeddings: Tensor, weight: float) -> None:
        self.embeddings, self.first, self.weight = embeddings, tokens.first, weight
        self.codec, self.keys = tokens.codec, torch.from_numpy(tokens.keys).to(embeddings.device)
        sizes = self.codec.codebook_sizes
        self.code_starts = tuple(sum(sizes[:level]) for level in range(len(sizes)))
        levels = zip(tokens.offsets.tolist(), sizes, strict=True)
        self.code_rows = torch.cat([embeddings[offset : offset + size] for offset, size in levels])
        self.code_rows[: sizes[0]] += self._added().to(self.code_rows)

    def _added(self) -> Tensor:
        """Mean of what the items with a token have beyond their codes, float32 by first code [T_1, H]; 0 for none."""
        size, width = self.codec.codebook_sizes[0], self.embeddings.shape[1]
        total = torch.zeros(size, width, device=self.keys.device)
        first_code_I = self.keys // self.codec.suffix_sizes[0]
        step = max(1, MAX_ELEMENTS // width)
        for start in range(0, len(self.keys), step):
            keys_X, rows = self.keys[start : start + step], slice(self.first + start, self.first + start + step)
            beyond_XH = self.embeddings[rows][: len(keys_X)].float() - self._code_sums(keys_X)
            total.index_add_(0, first_code_I[start : start + step], beyond_XH)
        return total / torch.bincount(first_code_I, minlength=size).clamp(min=1)[:, None]

    def __call__(self, hidden_XH: Tensor, keys_X: Tensor) -> Tensor:
        """``weight`` × the products of h_0 and items, float32 [X]; ``keys_X`` are any semantic IDs of these levels."""
        step = max(1, MAX_ELEMENTS // hidden_XH.shape[1])
        parts = zip(hidden_XH.split(step), keys_X.split(step), strict=True)
        products = [(hidden.float() * self.vectors(keys)).sum(1) for hidden, keys in parts]
        return self.weight * torch.cat(products)

    def vectors(self, keys_X: Tensor) -> Tensor:
        """Vectors of items in float32 [X, H]."""
        at_X = torch.searchsorted(self.keys, keys_X).clamp(max=len(self.keys) - 1)
        known_X = self.keys[at_X] == keys_X
        vectors_XH = F.embedding(torch.where(known_X, self.first + at_X, 0), self.embeddings).float()
        new = (~known_X).nonzero(as_tuple=True)
        if len(new[0]):
            vectors_XH[new] = self._code_sums(keys_X[new])
        return vectors_XH

    def _code_sums(self, keys_X: Tensor) -> Tensor:
        levels = zip(self.code_starts, self.codec.suffix_sizes, self.codec.codebook_sizes, strict=True)
        rows = [F.embedding(start + keys_X // suffix % size, self.code_rows).float() for start, suffix, size in levels]
        return torch.stack(rows).sum(0)
