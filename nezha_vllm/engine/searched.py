"""One generation of the catalogue as the draft stage searches it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nezha_vllm.beam import BeamSearch
from nezha_vllm.catalogue import Keys, load_keys
from nezha_vllm.draft_head import Eligible
from nezha_vllm.generation import Generation, check_levels
from nezha_vllm.manifest import read_manifest
from nezha_vllm.memory import check_fits
from nezha_vllm.segment_ranks import SegmentRanks, ranks_bytes

if TYPE_CHECKING:
    from nezha_vllm.engine.draft_graphs import DraftGraphs
    from nezha_vllm.engine.draft_stage import Search


class Searched:
    """The search over a generation's keys, and its segments."""

    def __init__(self, beam_search: BeamSearch, keys: Keys) -> None:
        self.beam_search = beam_search
        self.graphs: DraftGraphs | None = None
        self.place = 0  # among the catalogues of the graphs
        self.segments: SegmentRanks | None = None
        if keys.segments is not None and keys.first_row is not None:
            self.segments = SegmentRanks(keys.segments.bits, keys.first_row, beam_search.keys_M.device)

    def new_step(self) -> None:
        if self.segments is not None:
            self.segments.new_step()

    def ranks_at(self, search: Search) -> int | None:
        """Where the ranks of its combination are: -1 without one, None if the step's others fill the buffer."""
        if search.combination is None:
            return -1
        assert self.segments is not None, "the API process has the same catalogue"
        return self.segments.place(search.combination)

    def rule(self, search: Search) -> Eligible | None:
        if search.positions is None and search.combination is None:
            return None
        positions = torch.from_numpy(search.listed.astype(np.int64)).to(self.beam_search.keys_M.device)
        if search.combination is None:
            return Eligible(positions, search.only)
        assert self.segments is not None, "the API process has the same catalogue"
        return Eligible(positions, search.only, self.segments.array(search.combination))

    def open(self) -> None:
        if self.graphs is not None:
            assert self.beam_search.plan is not None, "the first had one, and this one is made like it"
            ranks = None if self.segments is None else self.segments.ranks
            self.place = self.graphs.put(self.beam_search.plan, ranks)

    def close(self) -> None:
        """Its memory goes with the object."""
        if self.graphs is not None:
            self.graphs.take_away(self.place)


def read_beside(
    store: Path, generation: Generation, beside: BeamSearch, workers: int, stream: torch.cuda.Stream | None
) -> Searched:
    """Read a generation while another one serves, in a thread.

    Args:
        beside: the search that serves.
        workers: processes of this server on this machine that do the same at the same time.
        stream: to bring it to a GPU.

    Raises:
        CatalogueError: it is damaged, of other levels, or does not fit.
    """
    folder = generation.folder(store)
    manifest = read_manifest(folder)
    check_levels(folder, manifest["codebook_sizes"], beside.head.codebook_sizes)
    device = beside.keys_M.device
    what = f"catalogue version {generation.version}"
    check_fits(workers * host_bytes(manifest), f"the search over {what}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: entering a stream would open a context on GPU 0 else
        check_fits(device_bytes(manifest, beside), f"the search over {what} on the GPU", device)
    keys = load_keys(folder)
    # beside the stream of the steps; always the same one, as PyTorch keeps freed memory for the stream that had it
    with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
        searched = Searched(beside.over(torch.from_numpy(keys.keys).to(device)), keys)
    if stream is not None:
        stream.synchronize()
    return searched


def host_bytes(manifest: dict[str, Any]) -> int:
    """Of an engine process, while it reads: keys and a check of them, with segments where items begin and ranks."""
    ids = manifest["num_ids"]
    if not manifest.get("segments"):
        return 10 * ids
    return 26 * ids + len(manifest["segments"]) * manifest["num_items"] // 8 + ranks_bytes(ids + 1)


def device_bytes(manifest: dict[str, Any], beside: BeamSearch) -> int:
    """On a GPU, while it reads: keys, tables and one of the lists they are made of, with segments as on the host."""
    tables = 0 if beside.plan is None else beside.plan.table_bytes
    ids, items, segments = manifest["num_ids"], manifest["num_items"], len(manifest.get("segments", []))
    return 8 * ids + 3 * tables + (segments and segments * items // 8 + 12 * items + 4 * ids + ranks_bytes(ids + 1))
