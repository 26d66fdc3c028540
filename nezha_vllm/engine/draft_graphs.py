"""The draft stage on a GPU: every batch is cut into launches of fixed shapes, each one CUDA graph.

A shape is N requests of K beams; requests of similar width share a launch, rows that none needs are left out by the
kernels, and rules are positions among the keys in a buffer that all launches of a step share. Nothing here waits for
the GPU: options go in and beams come out through pinned memory, in ring buffers deep enough for the steps in flight.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nezha_vllm.search_memory import Workspace
from nezha_vllm.triton_search import ALL, Plan

logger = logging.getLogger("vllm.nezha")

RING = 4  # steps whose buffers may be in use: two in flight, and room to spare
MAX_POSITIONS = 1 << 20  # semantic IDs in the rules of one step, 4 MB
OPTIONS = 8  # numbers a request: see `Plan.search`
PLACES = 2  # for catalogues: one in use and one that takes over
WIDTHS = (16, 64, 256, 512, 1024, 2048, 4096)  # each costs compilation once, and at start-up a graph a batch size


@dataclass(frozen=True)
class Launch:
    """Requests ``rows`` of a step, by one graph of ``size`` requests of ``width`` beams; staged from ``start`` on."""

    rows: list[int]
    size: int
    width: int
    start: int


@dataclass(frozen=True)
class Options:
    """What a request asks of its search; ``positions`` int32 belong to its ``rule``.

    ``ranks_at`` is where the ranks of its combination of segments begin, -1 without one. ``place`` is the catalogue's.
    """

    width: int
    stepwise: bool
    rule: int = ALL
    positions: np.ndarray | None = None
    ranks_at: int = -1
    place: int = 0


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    out: Tensor


class DraftGraphs:
    """All graphs of a server. They share one workspace, so they run one after the other, on the stream of the caller.

    Args:
        max_requests: most requests of a step.
        max_width: widest beam a request may ask for, at most 4,096.
        ranks: of `SegmentRanks`; None if the catalogue has no segments.

    Graphs read where a catalogue lies from device memory, so they search in one that comes later, too: ``put`` it in a
    place, and name the place in the options of its requests. Its arrays live as long as it has the place.
    """

    room_for_positions = MAX_POSITIONS  # of the rules of a step, together

    def __init__(self, plan: Plan, max_requests: int, max_width: int, ranks: Tensor | None = None) -> None:
        self.num_levels = plan.codec.num_levels
        self.widths = [width for width in WIDTHS if width < max_width]
        self.widths.append(next(width for width in WIDTHS if width >= max_width))
        sizes = [1 << bit for bit in range(10) if 1 << bit < 2 * max_requests]
        most_rows = plan.most_rows
        shapes = [(size, width) for width in self.widths for size in sizes if size == 1 or size * width <= most_rows]
        device = plan.weights.device
        self.num_states, hidden_size = self.num_levels + 1, plan.hidden_size
        most = max(size for size, _ in shapes)
        self.workspace = Workspace(plan, max(size * width for size, width in shapes), most, self.widths)
        self.hidden_NSH = torch.zeros(most, self.num_states, hidden_size, dtype=plan.weights.dtype, device=device)
        self.options_8N = torch.zeros(OPTIONS, most, dtype=torch.int32, device=device)
        lines = [plan.entry(ranks)] * PLACES
        self.catalogues = torch.tensor(lines, device=device)
        self.places: dict[int, tuple[Plan, Tensor | None]] = {0: (plan, ranks)}
        self.positions = torch.zeros(MAX_POSITIONS, dtype=torch.int32, device=device)
        self.out = torch.zeros(max(size * self._row(width) for size, width in shapes), dtype=torch.int32, device=device)
        # a step's requests, each launch rounded up to its size: fewer than twice as many, and one launch a width more
        staged = (2 * max_requests + len(self.widths)) * (self.num_states + OPTIONS)
        self.staging = torch.zeros(staged, dtype=torch.int32, device=device)
        self.host_positions = [torch.zeros(MAX_POSITIONS, dtype=torch.int32).pin_memory() for _ in range(RING)]
        self.host_staging = [torch.zeros(staged, dtype=torch.int32).pin_memory() for _ in range(RING)]
        room = max(self._row(width) * max_requests for width in self.widths)
        self.host_out = [torch.zeros(room, dtype=torch.int32).pin_memory() for _ in range(RING)]
        self.turn = 0
        self.stream = torch.cuda.Stream()  # of all captures: cuBLAS keeps a workspace a stream
        logger.info(
            "NEZHA: compiling the beam search for widths %s; the first start takes some 30 s longer", self.widths
        )
        # a collection that frees something on the device in the middle of a capture would spoil it
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            self.graphs = {shape: self._capture(plan, *shape) for shape in sorted(shapes, reverse=True)}
        finally:
            if collecting:
                gc.enable()
        # what the graphs read of the head; the arrays of the catalogue may go before them
        self._head = [plan.weights, *plan.code_drives, plan.few_tiles, plan.tiles, plan.items]

    def put(self, plan: Plan, ranks: Tensor | None) -> int:
        """Let graphs search in another catalogue, too; its place. Steps in flight do not look there."""
        place = next(place for place in range(PLACES) if place not in self.places)
        self.places[place] = plan, ranks
        with torch.cuda.stream(self.stream):
            self.catalogues[place].copy_(torch.tensor(plan.entry(ranks)))
        self.stream.synchronize()
        return place

    def take_away(self, place: int) -> None:
        """Free a place and what is there. Waits for the steps in flight, which may search in it."""
        torch.cuda.synchronize(self.catalogues.device)
        del self.places[place]

    def _row(self, width: int) -> int:
        return 2 + width * (1 + self.num_levels)

    def _capture(self, plan: Plan, size: int, width: int) -> _Graph:
        out = self.out[: size * self._row(width)].view(size, self._row(width))
        options_8N = self.options_8N.view(-1)[: OPTIONS * size].view(OPTIONS, size)

        def search() -> None:
            plan.search(self.workspace, self.hidden_NSH[:size], options_8N, out, width, self.positions, self.catalogues)

        # with real numbers, which the kernels' loops depend on: all beams of random states
        self.hidden_NSH.normal_()
        options_8N.zero_()[:3].fill_(1)[0].fill_(width)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            search()  # compiles
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            search()
        return _Graph(graph, out)

    def launches(self, widths: Sequence[int]) -> list[Launch]:
        """How a step's requests are cut up."""
        groups: dict[int, list[int]] = {}
        for row, width in enumerate(widths):
            groups.setdefault(next(bucket for bucket in self.widths if bucket >= width), []).append(row)
        found, start = [], 0
        for width, rows in sorted(groups.items()):
            most = max(size for size, bucket in self.graphs if bucket == width)
            for first in range(0, len(rows), most):
                part = rows[first : first + most]
                size = 1 << (len(part) - 1).bit_length()
                found.append(Launch(part, size, width, start))
                start += size * (self.num_states + OPTIONS)
        return found

    def stage(self, launches: Sequence[Launch], last_rows: Sequence[int], requests: Sequence[Options]) -> None:
        """Bring where each request's states are and its options to the device: one copy a step, two with rules.

        The positions of all rules together are at most MAX_POSITIONS.
        """
        self.turn = (self.turn + 1) % RING
        host, host_positions = self.host_staging[self.turn], self.host_positions[self.turn]
        values, positions = host.numpy(), host_positions.numpy()
        end = used = 0
        for launch in launches:
            end = launch.start + launch.size * (self.num_states + OPTIONS)
            part = values[launch.start : end]
            part[:] = 0
            options = part[: OPTIONS * launch.size].reshape(OPTIONS, launch.size)
            states = part[OPTIONS * launch.size :].reshape(launch.size, self.num_states)
            for place, row in enumerate(launch.rows):
                asked, last = requests[row], last_rows[row]
                begin = used
                if asked.positions is not None:
                    used += len(asked.positions)
                    positions[begin:used] = asked.positions
                options[:, place] = (
                    asked.width,
                    asked.stepwise,
                    1,
                    asked.rule,
                    begin,
                    used,
                    asked.ranks_at,
                    asked.place,
                )
                states[place] = np.arange(last + 1 - self.num_states, last + 1)
        self.staging[:end].copy_(host[:end], non_blocking=True)
        if used:
            self.positions[:used].copy_(host_positions[:used], non_blocking=True)

    def run(self, launch: Launch, states: Tensor) -> Tensor:
        """Beams of a staged launch, int32 [requests, 2 + K · (1 + L)], until the next launch overwrites them."""
        staged = self.staging[launch.start : launch.start + launch.size * (self.num_states + OPTIONS)]
        self.options_8N.view(-1)[: OPTIONS * launch.size].copy_(staged[: OPTIONS * launch.size])
        hidden = self.hidden_NSH[: launch.size].view(-1, self.hidden_NSH.shape[2])
        torch.index_select(states, 0, staged[OPTIONS * launch.size :], out=hidden)
        captured = self.graphs[launch.size, launch.width]
        captured.graph.replay()
        return captured.out[: len(launch.rows)]

    def to_host(self, out: Tensor, start: int) -> Tensor:
        """Enqueue the copy of a launch's beams to this step's pinned memory, from word ``start`` on."""
        host = self.host_out[self.turn][start : start + out.numel()].view(out.shape)
        return host.copy_(out, non_blocking=True)
