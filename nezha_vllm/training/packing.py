"""Packed training rows: one row trains every target of a segment, exactly as one row a prefix would.

A row holds the history once, and behind it one group of L placeholders for each target:

    x_1 x_2 … x_W | SP SP SP (target x_2) | SP SP SP (target x_3) | … | SP SP SP (target x_{W+1})

History tokens are causal among themselves. The placeholders of target i see the tokenizer's prefix, x_1 … x_i, and the
earlier placeholders of their own group, and have the position ids they would have right behind x_i. With W = 20 and
L = 3 a target costs 6 tokens instead of 33 on average. Histories that are too short are padded between history and
placeholders, where no labelled target looks, so one mask serves every row.

Rows of the language model are the same, with the target's codes but the last in place of the placeholders: teacher
forcing for every target. They are tokens of their own, not the history's, so that item dropout leaves them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nezha_vllm.config import AUTOREGRESSIVE, NezhaConfig

IGNORED = -100


class Segments(Dataset[Tensor]):
    """Random pieces of users' sequences, up to ``max_history`` + 1 items each, as codes [items, L].

    An epoch has as many pieces as cover every target once. Where a piece starts is drawn anew each time (from torch's
    global generator, which the Trainer seeds and restores), so over the epochs a target is seen behind histories of
    every length.
    """

    def __init__(self, sequences: Sequence[Tensor], max_history: int) -> None:
        self.sequences = [codes for codes in sequences if len(codes) >= 2]
        self.max_history = max_history
        self.pieces = [
            (index, first)
            for index, codes in enumerate(self.sequences)
            for first in range(0, len(codes) - 1, max_history)
        ]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        sequence, first = self.pieces[index]
        codes, span = self.sequences[sequence], self.max_history
        start = first - span // 2 + int(torch.randint(span, ()))
        start = max(0, min(start, len(codes) - 1 - span))
        return codes[start : start + span + 1]


@dataclass(frozen=True)
class PackedCollator:
    """Pieces of codes [items, L] → the arguments of the model's ``forward``.

    ``item_dropout`` is the probability with which an item of the history is blotted out, as a target it stays: the
    model must not hang on any single item. It costs nothing and helps small data sets more than feature dropout.
    """

    config: NezhaConfig
    max_history: int
    prefix: tuple[int, ...] = ()
    item_dropout: float = 0.0

    @property
    def _blot(self) -> int:
        pad = self.config.pad_token_id
        return self.config.placeholder_token_ids[0] if pad is None else pad

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mask [Q, Q] (True = may attend), position ids [Q] and read positions [P, S] of a row."""
        levels, targets, lead = self.config.num_levels, self.max_history, len(self.prefix)
        group = self.config.num_reads - 1
        history = lead + targets * levels
        # how many history tokens a token sees, and the group it belongs to (-1: history)
        target_Q = torch.arange(targets).repeat_interleave(group)
        seen_Q = torch.cat([torch.arange(1, history + 1), lead + (target_Q + 1) * levels])
        group_Q = torch.cat([torch.full((history,), -1), target_Q])
        index_Q = torch.arange(len(group_Q))
        sees_history_QQ = (group_Q == -1) & (index_Q < seen_Q[:, None])
        sees_group_QQ = (group_Q >= 0) & (group_Q == group_Q[:, None]) & (index_Q <= index_Q[:, None])
        level_Q = torch.arange(group).repeat(targets)
        position_Q = torch.cat([torch.arange(history), seen_Q[history:] + level_Q])
        last_P1 = lead + (torch.arange(targets)[:, None] + 1) * levels - 1
        groups_PG = history + torch.arange(targets * group).view(targets, group)
        return sees_history_QQ | sees_group_QQ, position_Q, torch.cat([last_P1, groups_PG], dim=1)

    def __call__(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        levels, targets, lead = self.config.num_levels, self.max_history, len(self.prefix)
        offsets = torch.tensor(self.config.code_token_offsets)
        mask_QQ, position_Q, read_PS = self._layout
        count, width = len(rows), len(position_Q)
        input_ids = torch.full((count, width), self.config.placeholder_token_ids[0])
        groups = input_ids[:, lead + targets * levels :].view(count, targets, -1)
        if self.config.method != AUTOREGRESSIVE:
            groups[:] = torch.tensor(self.config.placeholder_token_ids)
        input_ids[:, :lead] = torch.tensor(self.prefix, dtype=torch.long)
        labels = torch.full((count, targets, levels), IGNORED)
        for row, codes in enumerate(rows):
            used = len(codes) - 1
            history = codes[:-1] + offsets
            if self.item_dropout:
                history = history.masked_fill(torch.rand(used, 1) < self.item_dropout, self._blot)
            input_ids[row, lead : lead + used * levels] = history.flatten()
            labels[row, :used] = codes[1:]
            if self.config.method == AUTOREGRESSIVE:
                groups[row, :used] = (codes[1:] + offsets)[:, :-1]
        return {
            "input_ids": input_ids,
            "attention_mask": mask_QQ.expand(count, 1, width, width),
            "position_ids": position_Q.expand(count, width),
            "read_positions": read_PS.expand(count, *read_PS.shape),
            "labels": labels,
        }
