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
from nezha_vllm.draft_head import Beams, DraftHead
from nezha_vllm.engine.searched import Searched, read_beside
from nezha_vllm.engine.settings import ServerSettings, workers_here
from nezha_vllm.engine.stage_clock import StageClock, recorded_event, seconds_between, timed
from nezha_vllm.engine.versions import Versions
from nezha_vllm.generation import FIRST, Generation
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.segment_ranks import Places

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
    generation: str = FIRST  # of the catalogue that all these numbers belong to

    @property
    def listed(self) -> np.ndarray:
        """Positions of its rule, int32."""
        return np.frombuffer(self.positions or b"", np.int32)

    @property
    def num_listed(self) -> int:
        return len(self.positions or b"") // 4

    @property
    def combination(self) -> Places | None:
        """Of segments; None for all items."""
        return (tuple(self.all_of), tuple(self.none_of)) if self.all_of or self.none_of else None

    def options(self, ranks_at: int, place: int) -> Options:
        """The same for a launch on a GPU.

        Args:
            ranks_at: where the ranks of its combination are, -1 without one.
            place: of its generation among the graphs' catalogues.
        """
        from nezha_vllm.engine.draft_graphs import Options
        from nezha_vllm.triton_search import ALL, ALL_BUT, ONLY

        if self.positions is None and ranks_at < 0:
            return Options(self.beam_width, self.stepwise, ALL, place=place)
        return Options(self.beam_width, self.stepwise, ONLY if self.only else ALL_BUT, self.listed, ranks_at, place)

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Search | None:
        """None for vLLM's own warm-up requests, which carry no options."""
        options = (extra_args or {}).get(REQUEST_KEY)
        return None if options is None else cls(**options)


class DraftStage:
    """Runs the beam search over the catalogue that the server's settings name."""

    def __init__(self, head: DraftHead, vllm_config: VllmConfig, item_scores: ItemScores | None) -> None:
        self.settings = settings = ServerSettings.from_vllm(vllm_config)
        keys = load_keys(settings.start_folder)
        settings.check_version(keys.version)
        assert keys.codec.codebook_sizes == head.codebook_sizes, "the config hook compares them at start-up"
        self.num_states = head.num_levels + 1
        self.device = head.logit_heads[0].weight.device
        self.clock = StageClock(on_gpu=self.device.type == "cuda")
        self.workers_here = workers_here(vllm_config.parallel_config)
        first = Searched(BeamSearch(head, torch.from_numpy(keys.keys).to(self.device), item_scores), keys)
        self.versions = Versions(first, self._read)
        self.graphs: DraftGraphs | None = None
        plan = first.beam_search.plan
        if plan is not None and self.device.type == "cuda":
            from nezha_vllm.engine.draft_graphs import DraftGraphs

            most = vllm_config.scheduler_config.max_num_seqs
            ranks = None if first.segments is None else first.segments.ranks
            first.graphs = self.graphs = DraftGraphs(plan, most, settings.max_beam_width, ranks)

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
        there = {row: search for row, search in enumerate(searches) if search is not None}
        if not there:
            return payload.empty(num_requests, states.device)
        gone = self._gone(searches)
        parts = []
        if self.graphs is not None:
            last_rows = [self.num_states * (row + 1) - 1 for row in range(num_requests)]
            parts = [(part, beams.clone()) for part, beams in self._launches(states, last_rows, searches)]
        else:
            hidden_NSH = states.view(num_requests, self.num_states, -1)
            for searched, part in self._by_generation(there):
                asked = [there[row] for row in part]
                if len(part) == num_requests:
                    return payload.pack(self._search(searched, hidden_NSH, asked), self._width(searches))
                hidden = hidden_NSH[torch.tensor(part, device=states.device)]
                parts.append((part, answer_of(self._search(searched, hidden, asked))))
        if not parts:
            return payload.with_gone(payload.empty(num_requests, states.device), gone)
        found = payload.on_device(parts, num_requests, self._width(searches), self.num_states - 1)
        return payload.with_gone(found, gone)

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
        shape = (len(searches), self._width(searches), self.num_states - 1)
        return Pending(began, recorded_event(), parts, self._gone(searches), *shape)

    def _launches(
        self, states: Tensor, last_rows: Sequence[int], searches: Sequence[Search | None]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of the searches that are there and their beams, launch after launch."""
        assert self.graphs is not None
        there, options, apart, room = [], [], [], self.graphs.room_for_positions
        for row, search in enumerate(searches):
            searched = None if search is None else self._searched(search)
            if search is None or searched is None:
                continue
            ranks_at, listed = searched.ranks_at(search), search.num_listed
            if ranks_at is None or room < listed:
                apart.append((row, search, searched))  # a million IDs or a buffer of combinations: late, not never
            else:
                room -= listed
                there.append(row)
                options.append(search.options(ranks_at, searched.place))
        launches = self.graphs.launches([asked.width for asked in options])
        self.graphs.stage(launches, [int(last_rows[row]) for row in there], options)
        for launch in launches:
            yield [there[row] for row in launch.rows], self.graphs.run(launch, states)
        for row, search, searched in apart:
            last = int(last_rows[row])
            hidden_1SH = states[last + 1 - self.num_states : last + 1][None]
            yield [row], answer_of(self._search(searched, hidden_1SH, [search], kernels=False))

    def _search(
        self, searched: Searched, hidden_NSH: Tensor, searches: Sequence[Search], kernels: bool = True
    ) -> Beams:
        widths, stepwise = [search.beam_width for search in searches], [search.stepwise for search in searches]
        rules = [searched.rule(search) for search in searches]
        return searched.beam_search(hidden_NSH, widths, stepwise, rules, kernels)

    def _by_generation(self, there: Mapping[int, Search]) -> Iterator[tuple[Searched, list[int]]]:
        """The rows of each generation that some of the requests belong to."""
        parts: dict[str, list[int]] = {}
        for row, search in there.items():
            parts.setdefault(search.generation, []).append(row)
        for part in parts.values():
            searched = self._searched(there[part[0]])
            if searched is not None:
                yield searched, part

    def _searched(self, search: Search) -> Searched | None:
        """None if its generation is gone, as it is for a request that was aborted and whose row nobody reads."""
        return self.versions.find(search.generation)

    def _gone(self, searches: Sequence[Search | None]) -> list[int]:
        return [row for row, search in enumerate(searches) if search is not None and self._searched(search) is None]

    def _read(self, generation: Generation) -> Searched:
        beside = next(iter(self.versions))
        stream = None if self.graphs is None else self.graphs.stream
        searched = read_beside(self.settings.catalogue, generation, beside.beam_search, self.workers_here, stream)
        searched.graphs = self.graphs
        return searched

    def _new_step(self) -> None:
        for searched in self.versions:
            searched.new_step()

    def _width(self, searches: Sequence[Search | None]) -> int:
        return max((search.num_ids for search in searches if search is not None), default=0)


@dataclass(frozen=True)
class Pending:
    """Beams of one step; ``began`` is in front of their search, ``event`` behind their copy to the host."""

    began: torch.cuda.Event
    event: torch.cuda.Event
    parts: list[tuple[list[int], Tensor]]
    gone: list[int]
    num_requests: int
    width: int
    num_levels: int

    def payload(self) -> payload.HostPayload:
        """To be called behind the event and before the fourth step after this one."""
        answers = [(rows, beams.numpy()) for rows, beams in self.parts]
        gathered = payload.gather(answers, self.num_requests, self.width, self.num_levels)
        return payload.with_seconds(payload.with_gone(gathered, self.gone), seconds_between(self.began, self.event))
