"""The loss by which items learn what they are worth to a user (see ``item_scores``), beside that of their codes.

Shapes as in ``hf.modeling``; I items that have a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.item_tokens import ItemTokens

if TYPE_CHECKING:
    from nezha_vllm.training.lesson import Lesson


class ItemLoss(nn.Module):
    """``weight`` × the cross-entropy over the items that have a token; targets that have none do not count."""

    def __init__(self, tokens: ItemTokens, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("keys", torch.from_numpy(tokens.keys), persistent=False)
        self.register_buffer("suffixes", torch.tensor(tokens.codec.suffix_sizes), persistent=False)

    def forward(
        self,
        hidden_VH: Tensor,
        items_IH: Tensor,
        codes_VL: Tensor,
        counts_V: Tensor,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Of h_0 and the items' embeddings; where ``counts_V`` is false codes may be any. ``lesson``: the teachers'."""
        keys_V = (codes_VL * self.suffixes).sum(1)
        target_V = torch.searchsorted(self.keys, keys_V).clamp(max=len(self.keys) - 1)
        counts_V = counts_V & (self.keys[target_V] == keys_V)
        if lesson is None:
            loss_V = F.cross_entropy(F.linear(hidden_VH, items_IH).float(), target_V, reduction="none")
        else:
            log_p_VI = F.linear(hidden_VH, items_IH).float().log_softmax(1)
            true_V = log_p_VI.gather(1, target_V[:, None])[:, 0]
            loss_V = (lesson.weight - 1) * true_V - lesson.weight * (log_p_VI * lesson.p_VI).sum(1)
        return self.weight * (loss_V * counts_V).sum() / counts_V.sum().clamp(min=1)
