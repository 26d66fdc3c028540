"""Beam search as one call: the only door through which the engine and the evaluation reach a search.

Behind it stand the Triton kernels on GPUs and the PyTorch reference everywhere else. They give the same answers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nezha_vllm.config import MAX_BEAM_WIDTH
from nezha_vllm.draft_head import Beams, DraftHead, Eligible, reference_beam_search

if TYPE_CHECKING:
    from nezha_vllm.item_scores import ItemScores
    from nezha_vllm.triton_search import Plan

# elements of one [N, K, T] score tensor; the reference peaks at 56 bytes an element, so at 450 MiB. Larger batches are
# searched in slices of requests.
MAX_SCORES = 1 << 23
MAX_KERNEL_CODES = 16_384  # of a level: one program holds them all, and compiling for more takes minutes
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_run(head: DraftHead) -> bool:
    """Whether the Triton kernels can search with this head where it is.

    GPUs before compute capability 9.0 lack the shared memory that the kernels' blocks are made for.
    """
    if type(head) is not DraftHead:
        return False  # the kernels know this head's recurrence alone, and not that of ablations
    weight = head.logit_heads[0].weight
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (9, 0):
        return False
    if max(head.codebook_sizes) > MAX_KERNEL_CODES:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and weight.dtype == torch.float32
    if not (weight.is_cuda or interpreted) or weight.dtype not in KERNEL_DTYPES or weight.shape[1] % 64:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


class BeamSearch:
    """A draft head with its final weights, bound to a catalogue's sorted keys (int64 [M], on the head's device)."""

    def __init__(self, head: DraftHead, keys_M: Tensor, item_scores: ItemScores | None = None) -> None:
        self.head, self.keys_M, self.item_scores = head, keys_M, item_scores
        self.plan: Plan | None = None
        if kernels_run(head):
            from nezha_vllm.triton_search import Plan

            self.plan = Plan(head, keys_M, item_scores)
        else:
            self.code_drives = head.code_drives()

    def over(self, keys_M: Tensor) -> BeamSearch:
        """The same head bound to another catalogue of the same levels; what was made of the head is shared."""
        other = copy.copy(self)
        other.keys_M = keys_M
        other.plan = None if self.plan is None else self.plan.over(keys_M)
        return other

    def __call__(
        self,
        hidden_NSH: Tensor,
        widths: Sequence[int],
        stepwise: Sequence[bool],
        eligible: Sequence[Eligible | None] | None = None,
        kernels: bool = True,
    ) -> Beams:
        """Search N requests; ``widths``, ``stepwise`` and ``eligible`` are the beam width, mode and rule of each.

        ``hidden_NSH`` are the backbone's hidden states after its final norm, S = L + 1, any floating dtype. Widths over
        ``MAX_BEAM_WIDTH`` are searched by the reference, and so is everything without ``kernels``.
        """
        hidden_NSH = hidden_NSH.to(self.head.logit_heads[0].weight.dtype)
        rules = list(eligible) if eligible is not None else [None] * len(widths)
        use_kernels = kernels and self.plan is not None and max(widths) <= MAX_BEAM_WIDTH
        search, step = self._kernel_slices(widths) if use_kernels else self._reference_slices(widths)
        slices = [slice(start, start + step) for start in range(0, len(widths), step)]
        parts = [search(hidden_NSH[part], widths[part], stepwise[part], rules[part]) for part in slices]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def _reference_slices(self, widths: Sequence[int]) -> tuple:
        drives = self.head.code_drives() if self.plan else self.code_drives

        def search(hidden_NSH: Tensor, widths: Sequence[int], stepwise: Sequence[bool], rules: list) -> Beams:
            widths_N = torch.tensor(widths, dtype=torch.long, device=hidden_NSH.device)
            stepwise_N = torch.tensor(stepwise, dtype=torch.bool, device=hidden_NSH.device)
            return reference_beam_search(
                self.head, hidden_NSH, self.keys_M, widths_N, stepwise_N, drives, rules, self.item_scores
            )

        return search, max(1, MAX_SCORES // (max(widths) * max(self.head.codebook_sizes)))

    def _kernel_slices(self, widths: Sequence[int]) -> tuple:
        from nezha_vllm.search_memory import Workspace, width_bucket
        from nezha_vllm.triton_search import ALL, ALL_BUT, ONLY

        plan = self.plan
        assert plan is not None
        bucket = width_bucket(max(widths))
        step = min(len(widths), max(1, plan.most_rows // bucket))
        work = Workspace(plan, step * bucket, step, [bucket])
        num_levels = self.head.num_levels

        def search(hidden_NSH: Tensor, widths: Sequence[int], stepwise: Sequence[bool], rules: list) -> Beams:
            kinds, lists, ranks, ranks_at = [], [], [self.keys_M[:0]], []
            for rule in rules:
                kinds.append(ALL if rule is None else ONLY if rule.only else ALL_BUT)
                lists.append(self.keys_M[:0] if rule is None else rule.positions)
                ranks_at.append(-1)
                if rule is not None and rule.ranks is not None:
                    ranks_at[-1] = sum(map(len, ranks))
                    ranks.append(rule.ranks)
            ends = list(accumulate(map(len, lists)))
            ones, zeros = [1] * len(widths), [0] * len(widths)
            flags = [int(flag) for flag in stepwise]
            rows = [widths, flags, ones, kinds, [0, *ends[:-1]], ends, ranks_at, zeros]
            options_8N = torch.tensor(rows, dtype=torch.int32, device=hidden_NSH.device)
            out = options_8N.new_empty(len(widths), 2 + bucket * (1 + num_levels))
            positions, all_ranks = torch.cat(lists).int(), torch.cat(ranks).int()
            catalogues = torch.tensor([plan.entry(all_ranks)], device=hidden_NSH.device)
            plan.search(work, hidden_NSH.contiguous(), options_8N, out, bucket, positions, catalogues)
            return beams_of(out, num_levels, max(widths))

        return search, step


def beams_of(out: Tensor, num_levels: int, width: int) -> Beams:
    """The kernels' answer, int32 [N, 2 + K · (1 + L)], as `Beams` of ``width`` columns."""
    beams = out[:, 2:].view(len(out), -1, 1 + num_levels)[:, :width]
    index_NK = beams[..., 0].long()
    log_probs_NKL = beams[..., 1:].contiguous().view(torch.float32)
    scores_NK = log_probs_NKL.sum(2).masked_fill(index_NK < 0, -torch.inf)
    return Beams(index_NK, log_probs_NKL, scores_NK, out[:, 1].long(), out[:, 0].long())


def answer_of(beams: Beams) -> Tensor:
    """`Beams` as the kernels' answer, int32 [N, 2 + K · (1 + L)]."""
    log_probs_NKL = beams.log_probs_NKL.contiguous().view(torch.int32)
    rows = torch.cat([beams.index_NK[..., None].int(), log_probs_NKL], dim=2).flatten(1)
    return torch.cat([beams.valid_N[:, None].int(), beams.drafted_N[:, None].int(), rows], dim=1)


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
