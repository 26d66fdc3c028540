"""Where the Triton search keeps what it works on: the layout of a level's candidates, and the buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nezha_vllm.triton_search import Plan

WIDTHS = tuple(16 << step for step in range(9))  # the K a launch can have: 16 to 4,096
FANS = (2, 4, 8, 16, 32)


def width_bucket(width: int) -> int:
    """The K of the launch that searches ``width`` beams."""
    return next(bucket for bucket in WIDTHS if bucket >= width)


@dataclass(frozen=True)
class Geometry:
    """How a level's candidates are laid out: a row a parent, ``groups`` groups of ``fan`` chunks of ``fan`` codes."""

    most_parents: int
    fan: int
    groups: int

    @property
    def row_size(self) -> int:
        return self.groups * self.fan * self.fan


def tiles_of(parts: Sequence[tuple[int, int, int, int, int]], height: int) -> list[list[int]]:
    """Parts of the weights (first row, rows, state, state added or -1, first column) in lines of ``height`` rows."""
    return [
        [row + start, min(height, rows - start), state, added, column + start]
        for row, rows, state, added, column in parts
        for start in range(0, rows, height)
    ]


@dataclass
class BeamRows:
    counts: Tensor
    scores: Tensor
    prefixes: Tensor
    lows: Tensor
    highs: Tensor
    history: Tensor


class Workspace:
    """Buffers for ``rows`` = N · K beams at most, K one of ``widths``; searches that share them must take turns."""

    def __init__(self, plan: Plan, rows: int, requests: int, widths: Sequence[int] = WIDTHS) -> None:
        device, dtype, hidden_size = plan.weights.device, plan.weights.dtype, plan.hidden_size
        levels = plan.codec.num_levels

        def buffer(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        extents = [plan.geometry(index, width) for index in range(levels) for width in widths]
        fan = max(shape.fan for shape in extents)
        self.by_request = buffer((requests, plan.root_columns))
        self.logits = buffer((rows, max(shape.row_size for shape in extents)))
        self.drives = buffer((rows, hidden_size), dtype)
        self.states = buffer((rows, hidden_size), dtype)
        self.maxima = buffer((rows, max(shape.groups * shape.fan for shape in extents)))
        self.group_maxima = buffer((rows, max(shape.groups for shape in extents)))
        self.values = buffer((rows * fan,))
        self.chosen = buffer((4, rows), torch.int32)
        self.parents, self.codes = buffer((rows,), torch.int32), buffer((rows,), torch.int32)
        self.beams = [
            BeamRows(
                buffer((requests,), torch.int32),
                buffer((rows,)),
                buffer((rows,), torch.int64),
                buffer((rows,), torch.int32),
                buffer((rows,), torch.int32),
                buffer((rows, levels)),
            )
            for _ in range(3)
        ]

    @property
    def num_bytes(self) -> int:
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        tensors += [value for beams in self.beams for value in vars(beams).values()]
        return sum(tensor.nbytes for tensor in tensors)
