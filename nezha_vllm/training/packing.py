"""Packed training rows: one row trains every target of a segment, exactly as one row a prefix would.

A row holds the history once, and behind it one group of L placeholders for each target:

    x_1 x_2 … x_W | SP SP SP (target x_2) | SP SP SP (target x_3) | … | SP SP SP (target x_{W+1})

History tokens are causal among themselves. The placeholders of target i see the tokenizer's prefix, x_1 … x_i, and the
earlier placeholders of their own group, and have the position ids they would have right behind x_i. With W = 20 and
L = 3 a target costs 6 tokens instead of 33 on average. Histories that are too short share a row: a piece sees nothing
of the others and counts its positions from its own start. Of Beauty's 22,363 pieces, 6 targets long on average, 256
take 77 rows of 20.

Rows of the language model are the same, with the target's codes but the last in place of the placeholders: teacher
forcing for every target. They are tokens of their own, not the history's, so that item dropout leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nezha_vllm.config import AUTOREGRESSIVE, NezhaConfig
from nezha_vllm.item_tokens import ItemTokens

IGNORED = -100
Places = tuple[Tensor, Tensor, Tensor, int]  # see `places`


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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch, as torch's loader asks for it: one call for all that is drawn."""
        span, batch = self.max_history, []
        for index, drawn in zip(indices, torch.randint(span, (len(indices),)).tolist(), strict=True):
            sequence, first = self.pieces[index]
            codes = self.sequences[sequence]
            start = max(0, min(first - span // 2 + drawn, len(codes) - 1 - span))
            batch.append(codes[start : start + span + 1])
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Pieces of codes [items, L] → the arguments of the model's ``forward``.

    ``item_dropout`` is the probability with which an item of the history is blotted out, as a target it stays: the
    model must not hang on any single item. It costs nothing and helps small data sets more than feature dropout.
    Batches are on ``device``; mask and positions are made there, which spares 4 MB of copies a step.

    ``item_tokens``: the model's; ``item_token_dropout`` is the probability with which an item shows its codes instead,
    as one does that training never saw. Where tokens stand for all codes of their items (``ItemTokens.short``), the
    other L - 1 places of an item are empty, and nothing sees them; ``short_rows`` have no such places, see `shortened`.

    ``row_multiple``: empty rows are added up to a multiple of so many, so that few shapes occur and graphs can be
    replayed. More than one leaves out ``labelled``, whose length would hang on the pieces.
    """

    config: NezhaConfig
    max_history: int
    prefix: tuple[int, ...] = ()
    item_dropout: float = 0.0
    device: torch.device | str = "cpu"
    row_multiple: int = 1
    item_tokens: ItemTokens | None = None
    item_token_dropout: float = 0.0
    short_rows: bool = False

    @property
    def _slots(self) -> int:
        """Places of an item in a row."""
        return 1 if self.short_rows else self.config.num_levels

    @property
    def history_end(self) -> int:
        """Tokens of a row in front of the groups: prefix and history."""
        return len(self.prefix) + self.max_history * self._slots

    @property
    def _blot(self) -> int:
        pad = self.config.pad_token_id
        return self.config.placeholder_token_ids[0] if pad is None else pad

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a row with one piece: mask [Q, Q] (True = may attend), position ids [Q], read positions [P, S]; and the
        place in the history that a token belongs to [Q], -1 in the prefix."""
        slots, targets, lead = self._slots, self.max_history, len(self.prefix)
        group = self.config.num_reads - 1
        history = lead + targets * slots
        # how many history tokens a token sees, and the group it belongs to (-1: history)
        target_Q = torch.arange(targets).repeat_interleave(group)
        seen_Q = torch.cat([torch.arange(1, history + 1), lead + (target_Q + 1) * slots])
        group_Q = torch.cat([torch.full((history,), -1), target_Q])
        index_Q = torch.arange(len(group_Q))
        sees_history_QQ = (group_Q == -1) & (index_Q < seen_Q[:, None])
        sees_group_QQ = (group_Q >= 0) & (group_Q == group_Q[:, None]) & (index_Q <= index_Q[:, None])
        level_Q = torch.arange(group).repeat(targets)
        position_Q = torch.cat([torch.arange(history), seen_Q[history:] + level_Q])
        last_P1 = lead + (torch.arange(targets)[:, None] + 1) * slots - 1
        groups_PG = history + torch.arange(targets * group).view(targets, group)
        place_Q = torch.cat([torch.full((lead,), -1), torch.arange(targets).repeat_interleave(slots), target_Q])
        layout = sees_history_QQ | sees_group_QQ, position_Q, torch.cat([last_P1, groups_PG], dim=1), place_Q
        mask_QQ, position_Q, read_PS, place_Q = (tensor.to(self.device) for tensor in layout)
        return mask_QQ, position_Q, read_PS, place_Q

    def where(self, pieces: Sequence[Tensor]) -> Places:
        """Where their targets go, for several that read the same pieces."""
        return places([len(codes) - 1 for codes in pieces], self.max_history, self.row_multiple)

    def __call__(self, pieces: Sequence[Tensor], where: Places | None = None) -> dict[str, Tensor]:
        levels, targets, lead, slots = self.config.num_levels, self.max_history, len(self.prefix), self._slots
        offsets = torch.tensor(self.config.code_token_offsets)
        row_V, first_V, place_V, count = self.where(pieces) if where is None else where
        history_VL = torch.cat([codes[:-1] for codes in pieces]) + offsets
        empty_VL = None
        if self.item_tokens is not None:
            named_VL = torch.from_numpy(self.item_tokens.put(history_VL.numpy()))
            shown = torch.rand(len(history_VL), 1) >= self.item_token_dropout
            history_VL = torch.where(shown, named_VL, history_VL)[:, -slots:]
            if self.item_tokens.short and slots > 1:
                empty_VL = (history_VL[:, -1:] >= self.item_tokens.first).repeat(1, levels)
                empty_VL[:, -1] = False
        if self.item_dropout:
            history_VL = history_VL.masked_fill(torch.rand(len(history_VL), 1) < self.item_dropout, self._blot)
        target_VL = torch.cat([codes[1:] for codes in pieces])
        width = lead + targets * (slots + self.config.num_reads - 1)
        input_ids_NQ = torch.full((count, width), self.config.placeholder_token_ids[0])
        input_ids_NQ[:, :lead] = torch.tensor(self.prefix, dtype=torch.long)
        end = self.history_end
        input_ids_NQ[:, lead:end].view(count, targets, slots)[row_V, place_V] = history_VL
        groups = input_ids_NQ[:, end:].view(count, targets, self.config.num_reads - 1)
        if self.config.method == AUTOREGRESSIVE:
            groups[row_V, place_V] = (target_VL + offsets)[:, :-1]
        else:
            groups[:] = torch.tensor(self.config.placeholder_token_ids)
        labels_NPL = torch.full((count, targets, levels), IGNORED)
        labels_NPL[row_V, place_V] = target_VL
        # the place at which the piece of each place starts; unused places at the end are a piece of their own
        starts_NP = torch.full((count, targets), targets)
        starts_NP[row_V, place_V] = first_V
        input_ids_NQ, labels_NPL, starts_NP = map(self.moved, (input_ids_NQ, labels_NPL, starts_NP))

        mask_QQ, position_Q, read_PS, place_Q = self._layout
        start_NQ = starts_NP[:, place_Q].masked_fill(place_Q < 0, -1)
        same_NQQ = (start_NQ[:, :, None] == start_NQ[:, None]) | (place_Q < 0)
        moved_NQ = start_NQ.masked_fill((start_NQ < 0) | (start_NQ == targets), 0) * slots
        sees_NQQ, position_NQ = mask_QQ & same_NQQ, position_Q - moved_NQ
        if empty_VL is not None:
            empty_NPL = torch.zeros(count, targets, levels, dtype=torch.bool)
            empty_NPL[row_V, place_V] = empty_VL
            sees_NQQ, position_NQ = self._closed_up(sees_NQQ, position_NQ, start_NQ, self.moved(empty_NPL))
        arguments = {
            "input_ids": input_ids_NQ,
            "attention_mask": sees_NQQ[:, None],
            "position_ids": position_NQ,
            "read_positions": read_PS.expand(count, *read_PS.shape),
            "labels": labels_NPL,
        }
        if self.row_multiple == 1:
            arguments["labelled"] = self.moved((row_V * targets + place_V).sort().values)
        return arguments

    def _closed_up(
        self, sees_NQQ: Tensor, position_NQ: Tensor, start_NQ: Tensor, empty_NPL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mask and position ids as if the empty places of items were not there."""
        targets, levels = empty_NPL.shape[1:]
        lead, (mask_QQ, position_Q, read_PS, _) = len(self.prefix), self._layout
        history, width = lead + targets * levels, len(position_Q)
        # how many places of a row are empty in front of each, and in front of the piece that it belongs to
        before_NX = F.pad(empty_NPL.flatten(1).cumsum(1), (lead + 1, 0))
        behind_P = (read_PS[:, 0] + 1).repeat_interleave(self.config.num_reads - 1)
        passed_NQ = before_NX[:, torch.cat([position_Q[:history], behind_P])]
        begun_NQ = before_NX.gather(1, (lead + start_NQ * levels).clamp(min=0).where(start_NQ >= 0, 0))
        seen_NQ = ~F.pad(empty_NPL.flatten(1), (lead, width - history))
        alone_QQ = torch.eye(width, dtype=torch.bool, device=mask_QQ.device)  # a softmax over nothing is no number
        return sees_NQQ & seen_NQ[:, None] | alone_QQ, position_NQ - (passed_NQ - begun_NQ)

    def moved(self, tensor: Tensor) -> Tensor:
        """To the device; a GPU is not waited for."""
        if torch.device(self.device).type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def shortened(sequences: Sequence[Tensor], item_tokens: ItemTokens | None, item_token_dropout: float) -> bool:
    """Whether every item of these sequences of codes [items, L] always stands as one token in a history.

    Then rows need one place an item instead of L: 80 tokens instead of 120 for W = 20, L = 3.
    """
    if item_tokens is None or not item_tokens.short or item_token_dropout:
        return False
    keys = item_tokens.codec.key(torch.cat(list(sequences)).numpy())
    return bool(np.isin(keys, item_tokens.keys).all())


def places(used: Sequence[int], capacity: int, multiple: int = 1) -> Places:
    """Where the targets of pieces go, int64 [V] each: row, the place in it where the piece starts, the target's own.

    And the number of rows, a multiple of ``multiple``. ``used``: targets of each piece; ``capacity``: of a row.
    """
    row_of, first_of, count = packed(used, capacity)
    used_I = torch.tensor(used)
    piece_V = torch.arange(len(used)).repeat_interleave(used_I)
    row_V, first_V = torch.tensor(row_of)[piece_V], torch.tensor(first_of)[piece_V]
    place_V = first_V + torch.arange(len(piece_V)) - (used_I.cumsum(0) - used_I)[piece_V]
    return row_V, first_V, place_V, math.ceil(count / multiple) * multiple


def packed(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int], int]:
    """Pieces into rows, best fit of the longest first: the row of each, its place there, and the number of rows.

    Rows are in the order of their first pieces, so pieces that fill a row stay as they came.
    """
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by what is left in them
    row_of, first_of, count = [0] * len(lengths), [0] * len(lengths), 0
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        length = lengths[piece]
        assert 1 <= length <= capacity, f"a piece of {length} targets does not fit into a row of {capacity}"
        left = next((left for left in range(length, capacity + 1) if open_rows[left]), None)
        if left is None:
            row, left, count = count, capacity, count + 1
        else:
            row = open_rows[left].pop()
        row_of[piece], first_of[piece] = row, capacity - left
        open_rows[left - length].append(row)
    order: dict[int, int] = {}
    return [order.setdefault(row, len(order)) for row in row_of], first_of, count
