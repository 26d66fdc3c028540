"""A loss over all items beside that of their codes, in training only: the signal that SASRec learns from.

The score of an item is the product of h_0, which every method reads, and the sum of the embeddings of its codes and a
vector of its own; the vectors are dropped after training. Shapes as in ``hf.modeling``; I semantic IDs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.config import NezhaConfig


class ItemLoss(nn.Module):
    """``weight`` × the cross-entropy over the catalogue's semantic IDs."""

    def __init__(self, config: NezhaConfig, catalogue: Catalogue, weight: float, seed: int = 0) -> None:
        super().__init__()
        self.weight, codec = weight, config.codec
        keys_I = torch.from_numpy(catalogue.keys.copy())
        suffixes_L = torch.tensor(codec.suffix_sizes)
        codes_IL = keys_I[:, None] // suffixes_L % torch.tensor(codec.codebook_sizes)
        generator = torch.Generator().manual_seed(seed)
        own_IH = config.initializer_range * torch.randn(len(keys_I), config.hidden_size, generator=generator)
        self.own = nn.Parameter(own_IH)
        self.register_buffer("keys", keys_I, persistent=False)
        self.register_buffer("suffixes", suffixes_L, persistent=False)
        self.register_buffer("tokens", codes_IL + torch.tensor(config.code_token_offsets), persistent=False)

    def forward(self, hidden_VH: Tensor, embeddings: Tensor, codes_VL: Tensor, counts_V: Tensor) -> Tensor:
        """Of the targets with these codes; those that do not count may have any."""
        items_IH = self.own + F.embedding(self.tokens, embeddings).sum(1)
        target_V = torch.searchsorted(self.keys, (codes_VL * self.suffixes).sum(1)).clamp(max=len(self.keys) - 1)
        loss_V = F.cross_entropy(F.linear(hidden_VH, items_IH).float(), target_V, reduction="none")
        return self.weight * (loss_V * counts_V).sum() / counts_V.sum()
