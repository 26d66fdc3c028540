"""The step behind the backbone: hidden states of a batch in, one payload row a request out. Shared by both runners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig

from nezha_vllm import payload
from nezha_vllm.beam import BeamSearch, answer_of
from nezha_vllm.catalogue import load_keys
from nezha_vllm.draft_head import Beams, DraftHead, Eligible
from nezha_vllm.engine.settings import ServerSettings
from nezha_vllm.engine.stage_clock import StageClock, recorded_event, seconds_between, timed
from nezha_vllm.segment_ranks import Places, SegmentRanks

if TYPE_CHECKING:
    from nezha_vllm.engine.draft_graphs import DraftGraphs, Options

REQUEST_KEY = "nezha"


@dataclass(frozen=True)
class Search:
    """One request's part of the search, as the API process sends it in ``SamplingParams.extra_args["nezha"]``."""

    num_ids: int
    beam_width: int
    stepwise: bool
    only: bool = False  # of the rule, if there are positions: see `Eligible`; int32, as bytes
    positions: bytes | None = None
    all_of: Sequence[int] = ()  # places of the segments that its items are in
    none_of: Sequence[int] = ()  # and of those that they are not in

    @property
    def listed(self) -> np.ndarray:
        """Positions of its rule, int32."""
        return np.frombuffer(self.positions or b"", np.int32)

    @property
    def combination(self) -> Places | None:
        """Of segments; None for all items."""
        return (tuple(self.all_of), tuple(self.none_of)) if self.all_of or self.none_of else None

    def options(self, ranks_at: int) -> Options:
        """The same for a launch on a GPU; ``ranks_at`` is where the ranks of its combination are, -1 without one."""
        from nezha_vllm.engine.draft_graphs import Options
        from nezha_vllm.triton_search import ALL, ALL_BUT, ONLY

        if self.positions is None and ranks_at < 0:
            return Options(self.beam_width, self.stepwise, ALL)
        return Options(self.beam_width, self.stepwise, ONLY if self.only else ALL_BUT, self.listed, ranks_at)

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Search | None:
        """None for vLLM's own warm-up requests, which carry no options."""
        options = (extra_args or {}).get(REQUEST_KEY)
        return None if options is None else cls(**options)


class DraftStage:
    """Runs the beam search over the catalogue that the server's settings name."""

    def __init__(self, head: DraftHead, vllm_config: VllmConfig) -> None:
        settings = ServerSettings.from_vllm(vllm_config)
        codec, version, keys, segments, first_row = load_keys(settings.catalogue)
        settings.check_version(version)
        assert codec.codebook_sizes == head.codebook_sizes, "the config hook compares them at start-up"
        self.num_states = head.num_levels + 1
        device = head.logit_heads[0].weight.device
        self.clock = StageClock(on_gpu=device.type == "cuda")
        self.beam_search = BeamSearch(head, torch.from_numpy(keys).to(device))
        self.segments: SegmentRanks | None = None
        if segments is not None and first_row is not None:
            self.segments = SegmentRanks(segments.bits, first_row, device)
        self.graphs: DraftGraphs | None = None
        if self.beam_search.plan is not None and head.logit_heads[0].weight.is_cuda:
            from nezha_vllm.engine.draft_graphs import DraftGraphs

            most = vllm_config.scheduler_config.max_num_seqs
            ranks = None if self.segments is None else self.segments.ranks
            self.graphs = DraftGraphs(self.beam_search.plan, most, settings.max_beam_width, ranks)

    def widen(self, last_N: Tensor) -> Tensor:
        """Rows of the L + 1 states of each request from the row of its last token, [N] → [N · (L + 1)]."""
        offsets = torch.arange(1 - self.num_states, 1, dtype=last_N.dtype, device=last_N.device)
        return (last_N[:, None] + offsets).clamp_min(0).flatten()

    @timed
    def __call__(self, states: Tensor, searches: Sequence[Search | None]) -> payload.Payload:
        """Search the requests that have one; the others get an empty row.

        Args:
            states: [N · (L + 1), H], or [N, H] in vLLM's own dummy runs.
            searches: one a request; None where this step finishes no prompt.
        """
        self._new_step()
        num_requests = len(searches)
        rows = [row for row, search in enumerate(searches) if search is not None]
        if not rows:
            return payload.empty(num_requests, states.device)
        if self.graphs is not None:
            last_rows = [self.num_states * (row + 1) - 1 for row in range(num_requests)]
            parts = [(rows, beams.clone()) for rows, beams in self._launches(states, last_rows, searches)]
            return payload.on_device(parts, num_requests, self._width(searches), self.num_states - 1)
        active = [search for search in searches if search is not None]
        hidden_NSH = states.view(num_requests, self.num_states, -1)
        if len(rows) < num_requests:
            hidden_NSH = hidden_NSH[torch.tensor(rows, device=states.device)]
        beams = self._search(hidden_NSH, active)
        packed = payload.pack(beams, self._width(searches))
        if len(rows) == num_requests:
            return packed
        target = torch.tensor(rows, device=states.device)
        return payload.Payload(*(_scatter(tensor, target, num_requests) for tensor in packed))

    def run(self, states: Tensor, last_rows: Sequence[int], searches: Sequence[Search | None]) -> Pending:
        """The same, on its way to the host: enqueues everything on the current stream and waits for nothing.

        Args:
            states: [R, H], hidden states of the step's tokens.
            last_rows: row of each request's last token.
        """
        assert self.graphs is not None, "only a GPU runs ahead of the host"
        self._new_step()
        began = recorded_event()
        parts, start = [], 0
        for rows, beams in self._launches(states, last_rows, searches):
            parts.append((rows, self.graphs.to_host(beams, start)))
            start += beams.numel()
        return Pending(began, recorded_event(), parts, len(searches), self._width(searches), self.num_states - 1)

    def _launches(
        self, states: Tensor, last_rows: Sequence[int], searches: Sequence[Search | None]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of the searches that are there and their beams, launch after launch."""
        assert self.graphs is not None
        there, options, apart, room = [], [], [], self.graphs.room_for_positions
        for row, search in enumerate(searches):
            if search is None:
                continue
            ranks_at = self._ranks_at(search)
            if ranks_at is None or room < len(search.listed):
                apart.append((row, search))  # a million IDs or a buffer of combinations in a step: late, not never
            else:
                room -= len(search.listed)
                there.append(row)
                options.append(search.options(ranks_at))
        launches = self.graphs.launches([asked.width for asked in options])
        self.graphs.stage(launches, [int(last_rows[row]) for row in there], options)
        for launch in launches:
            yield [there[row] for row in launch.rows], self.graphs.run(launch, states)
        for row, search in apart:
            last = int(last_rows[row])
            hidden_1SH = states[last + 1 - self.num_states : last + 1][None]
            yield [row], answer_of(self._search(hidden_1SH, [search], kernels=False))

    def _search(self, hidden_NSH: Tensor, searches: Sequence[Search], kernels: bool = True) -> Beams:
        widths, stepwise = [search.beam_width for search in searches], [search.stepwise for search in searches]
        return self.beam_search(hidden_NSH, widths, stepwise, [self._rule(search) for search in searches], kernels)

    def _new_step(self) -> None:
        if self.segments is not None:
            self.segments.new_step()

    def _ranks_at(self, search: Search) -> int | None:
        """Where the ranks of its combination are: -1 without one, None if the step's others fill the buffer."""
        if search.combination is None:
            return -1
        assert self.segments is not None, "the API process has the same catalogue"
        return self.segments.place(search.combination)

    def _rule(self, search: Search) -> Eligible | None:
        if search.positions is None and search.combination is None:
            return None
        positions = torch.from_numpy(search.listed.astype(np.int64)).to(self.beam_search.keys_M.device)
        if search.combination is None:
            return Eligible(positions, search.only)
        assert self.segments is not None, "the API process has the same catalogue"
        return Eligible(positions, search.only, self.segments.array(search.combination))

    def _width(self, searches: Sequence[Search | None]) -> int:
        return max((search.num_ids for search in searches if search is not None), default=0)


@dataclass(frozen=True)
class Pending:
    """Beams of one step; ``began`` is in front of their search, ``event`` behind their copy to the host."""

    began: torch.cuda.Event
    event: torch.cuda.Event
    parts: list[tuple[list[int], Tensor]]
    num_requests: int
    width: int
    num_levels: int

    def payload(self) -> payload.HostPayload:
        """To be called behind the event and before the fourth step after this one."""
        answers = [(rows, beams.numpy()) for rows, beams in self.parts]
        gathered = payload.gather(answers, self.num_requests, self.width, self.num_levels)
        return payload.with_seconds(gathered, seconds_between(self.began, self.event))


def _scatter(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)
