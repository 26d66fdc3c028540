"""What NEZHA is compared with, as draft heads that share its training, beam search and evaluation.

None of them is served: the engine refuses a checkpoint whose ``method`` is not ``nezha``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.config import AUTOREGRESSIVE
from nezha_vllm.draft_head import DraftHead

LABELS = {
    "nezha": "NEZHA",
    "nezha-1": "NEZHA-1, no context state",
    "nezha-2": "NEZHA-2, no placeholders",
    "nezha-3": "NEZHA-3, summed context state",
    "mtp": "MTP heads",
    AUTOREGRESSIVE: "language model, constrained beam search",
}
FREE_LABEL = "language model, beam search"  # over its whole vocabulary; invalid beams are lost
WITHOUT_PLACEHOLDERS = ("nezha-2", "mtp")  # every level reads h_0


class NoContextHead(DraftHead):
    """NEZHA-1: z_1 = W_1 (h_0 + h_1), z_l = W_l h_l. No level knows the codes before it."""

    def __init__(self, hidden_size: int, codebook_sizes: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__(hidden_size, codebook_sizes, dtype)
        self.hidden_size = hidden_size
        self.code_embeddings, self.cells = nn.ModuleList(), nn.ModuleList()

    def code_drive(self, level: int, codes: Tensor) -> Tensor:
        weight = self.logit_heads[level].weight
        return torch.zeros(*codes.shape, self.hidden_size, device=weight.device, dtype=weight.dtype)

    def recurrence(self, level: int, state: Tensor) -> Tensor:
        return torch.zeros_like(state)


class SummedContextHead(DraftHead):
    """NEZHA-3: s_{l+1} = s_l + E_l[t_l]."""

    def __init__(self, hidden_size: int, codebook_sizes: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__(hidden_size, codebook_sizes, dtype)
        self.cells = nn.ModuleList()

    def code_drive(self, level: int, codes: Tensor) -> Tensor:
        return self.code_embeddings[level](codes)

    def recurrence(self, level: int, state: Tensor) -> Tensor:
        return state

    def activation(self, drive: Tensor) -> Tensor:
        return drive


class MtpHead(NoContextHead):
    """Multi-token prediction: z_l = W_l (h_0 + SiLU(R_l h_0)), the heads of Medusa (arXiv 2401.10774)."""

    def __init__(self, hidden_size: int, codebook_sizes: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__(hidden_size, codebook_sizes, dtype)
        self.residual = nn.ModuleList(nn.Linear(hidden_size, hidden_size, dtype=dtype) for _ in codebook_sizes)

    def log_probs(self, level: int, state: Tensor, hidden: Tensor) -> Tensor:
        features = hidden + F.silu(self.residual[level](hidden))
        # broadcast over the beams, which all read the same
        features = features.expand(torch.broadcast_shapes(state.shape, hidden.shape))
        return self.logit_heads[level](features).float().log_softmax(-1)


HEADS: dict[str, type[DraftHead]] = {
    "nezha": DraftHead,
    "nezha-1": NoContextHead,
    "nezha-2": DraftHead,
    "nezha-3": SummedContextHead,
    "mtp": MtpHead,
}
