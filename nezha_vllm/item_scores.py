"""What an item itself is worth to a user, beside its codes: the product of h_0 and the item's embedding.

Codes find what a user may want, but say only what items share; which of them this user takes next is learnt by the
vector of the item's token (see ``item_tokens``), by which training predicts it as SASRec does. ``weight`` times the
product counts with the last code, so the beams that a search found are put in order by both, and all behind it stays
as it is. An item without a token, such as a new one, has the sum of its codes' embeddings: where training starts for
all of them.
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

    ``keys`` int64 [I], ascending, have the token ids from ``first`` on; code c of level l has ``offsets[l] + c``.
    """

    def __init__(self, tokens: ItemTokens, embeddings: Tensor, weight: float) -> None:
        self.embeddings, self.first, self.weight = embeddings, tokens.first, weight
        self.codec, self.offsets = tokens.codec, tuple(tokens.offsets.tolist())
        self.keys = torch.from_numpy(tokens.keys).to(embeddings.device)

    def __call__(self, hidden_XH: Tensor, keys_X: Tensor) -> Tensor:
        """``weight`` × the products of h_0 and items, float32 [X]; ``keys_X`` are any semantic IDs of these levels."""
        step = max(1, MAX_ELEMENTS // hidden_XH.shape[1])
        parts = zip(hidden_XH.split(step), keys_X.split(step), strict=True)
        products = [(hidden.float() * self.vectors(keys)).sum(1) for hidden, keys in parts]
        return self.weight * torch.cat(products)

    def vectors(self, keys_X: Tensor) -> Tensor:
        """Embeddings of items in float32 [X, H]."""
        at_X = torch.searchsorted(self.keys, keys_X).clamp(max=len(self.keys) - 1)
        known_X = self.keys[at_X] == keys_X
        vectors_XH = F.embedding(torch.where(known_X, self.first + at_X, 0), self.embeddings).float()
        new = (~known_X).nonzero(as_tuple=True)
        if len(new[0]):
            sums = torch.zeros_like(vectors_XH[new])
            levels = zip(self.offsets, self.codec.suffix_sizes, self.codec.codebook_sizes, strict=True)
            for offset, suffix, size in levels:
                sums += F.embedding(offset + keys_X[new] // suffix % size, self.embeddings).float()
            vectors_XH[new] = sums
        return vectors_XH
