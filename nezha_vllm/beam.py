"""Beam search as one call: the only door through which the engine and the evaluation reach a search.

On every device this is today the PyTorch reference; Triton kernels take its place behind the same call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nezha_vllm.draft_head import Beams, DraftHead, reference_beam_search

# elements of one [N, K, T] score tensor; the reference peaks at 56 bytes an element, so at 450 MiB. Larger batches are
# searched in slices of requests.
MAX_SCORES = 1 << 23


class BeamSearch:
    """A draft head with its final weights, bound to a catalogue's sorted keys (int64 [M], on the head's device)."""

    def __init__(self, head: DraftHead, keys_M: Tensor) -> None:
        self.head, self.keys_M = head, keys_M
        self.code_drives = head.code_drives()

    def __call__(self, hidden_NSH: Tensor, widths: Sequence[int], stepwise: Sequence[bool]) -> Beams:
        """Search N requests; ``widths`` and ``stepwise`` are the beam width and validity mode of each.

        ``hidden_NSH`` are the backbone's hidden states after its final norm, S = L + 1, any floating dtype.
        """
        device = hidden_NSH.device
        hidden_NSH = hidden_NSH.to(self.head.logit_heads[0].weight.dtype)
        widths_N = torch.tensor(widths, dtype=torch.long, device=device)
        stepwise_N = torch.tensor(stepwise, dtype=torch.bool, device=device)
        per_request = max(widths) * max(self.head.codebook_sizes)
        step = max(1, MAX_SCORES // per_request)
        parts = [
            reference_beam_search(self.head, hidden_nSH, self.keys_M, widths_n, stepwise_n, self.code_drives)
            for hidden_nSH, widths_n, stepwise_n in zip(
                hidden_NSH.split(step), widths_N.split(step), stepwise_N.split(step), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else _concatenate(parts)


def _concatenate(parts: list[Beams]) -> Beams:
    width = max(part.index_NK.shape[1] for part in parts)

    def stack(name: str, fill: float) -> Tensor:
        tensors = []
        for part in parts:
            tensor = getattr(part, name)
            missing = width - tensor.shape[1]
            padding = (0, 0) * (tensor.dim() - 2) + (0, missing)
            tensors.append(torch.nn.functional.pad(tensor, padding, value=fill))
        return torch.cat(tensors)

    return Beams(
        stack("index_NK", -1),
        stack("log_probs_NKL", 0.0),
        stack("scores_NK", -torch.inf),
        torch.cat([part.drafted_N for part in parts]),
        torch.cat([part.valid_N for part in parts]),
    )
