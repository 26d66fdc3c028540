"""Embeddings of item tokens while they are trained: the sum of the item's code embeddings, and a vector of its own.

The sum says where an item lies among the others, also while its own vector, which starts at zero, knows nothing yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.config import NezhaConfig
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.semantic_id import SemanticIdCodec


def frequent_keys(sequences: Sequence[Tensor], codec: SemanticIdCodec, most: int) -> np.ndarray:
    """The semantic IDs that sequences of codes [items, L] have most often, int64, ascending."""
    counts = Counter(codec.key(torch.cat(list(sequences)).numpy()).tolist())
    return np.sort(np.array([key for key, _ in counts.most_common(most)], np.int64))


class ItemEmbeddings(nn.Module):
    """Token ids → embeddings, for ids of the vocabulary and, behind them, of item tokens.

    ``own`` [I, H] are the items' vectors; ``embed_tokens`` is the backbone's, whose forward is not called, so that what
    is hooked to this module acts once.
    """

    def __init__(self, config: NezhaConfig, keys: np.ndarray, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = ItemTokens.of(keys, config)
        self.embed_tokens = [embed_tokens]  # not a submodule of this one, too
        self.own = nn.Embedding(len(keys), config.hidden_size)
        nn.init.zeros_(self.own.weight)
        codes_IL = torch.from_numpy(config.codec.codes_of_key(keys).astype(np.int64))
        self.register_buffer("codes", codes_IL + torch.tensor(config.code_token_offsets), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        weight_VH, first = self.embed_tokens[0].weight, self.tokens.first
        item = ids - first
        known = (item >= 0)[..., None]
        item = item.clamp(min=0)
        rows = self._sums(self.own(item), self.codes[item])
        return torch.where(known, rows, F.embedding(ids.clamp(max=first - 1), weight_VH))

    def rows(self) -> Tensor:
        """Embeddings [I, H] of all item tokens."""
        return self._sums(self.own.weight, self.codes)

    def _sums(self, rows: Tensor, codes: Tensor) -> Tensor:
        for level in codes.unbind(-1):  # one after another: their sum is all that has to be kept
            rows = rows + F.embedding(level, self.embed_tokens[0].weight)
        return rows
