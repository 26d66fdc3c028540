"""Beam search as one call: the only door through which the engine and the evaluation reach a search.

On every device this is today the PyTorch reference; Triton kernels take its place behind the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nezha_vllm.draft_head import Beams, DraftHead, reference_beam_search

# float32 elements of one [N, K, T] score tensor (256 MiB): larger batches are searched in slices of requests
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class BeamSearch:
    """A draft head bound to a catalogue's sorted keys (int64 [M], on the head's device)."""

    head: DraftHead
    keys_M: Tensor

    def __call__(self, hidden_NSH: Tensor, widths: Sequence[int], stepwise: Sequence[bool]) -> Beams:
        """Search N requests; ``widths`` and ``stepwise`` are the beam width and validity mode of each.

        ``hidden_NSH`` are the backbone's hidden states after its final norm, S = L + 1, any floating dtype.
        """
        num_requests, device = len(hidden_NSH), hidden_NSH.device
        hidden_NSH = hidden_NSH.to(self.head.logit_heads[0].weight.dtype)
        widths_N = torch.tensor(widths, dtype=torch.long, device=device)
        stepwise_N = torch.tensor(stepwise, dtype=torch.bool, device=device)
        per_request = max(widths) * max(self.head.codebook_sizes)
        step = max(1, MAX_SCORES // per_request)
        if num_requests <= step:
            return reference_beam_search(self.head, hidden_NSH, self.keys_M, widths_N, stepwise_N)
        slices = [slice(start, start + step) for start in range(0, num_requests, step)]
        return _concatenate(
            [reference_beam_search(self.head, hidden_NSH[s], self.keys_M, widths_N[s], stepwise_N[s]) for s in slices]
        )


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
