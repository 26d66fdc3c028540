"""A draft head with random weights, a catalogue of random keys, and searches of one shape in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import floors
from nezha_vllm.beam import MAX_SCORES
from nezha_vllm.draft_head import DraftHead, reference_beam_search
from nezha_vllm.item_scores import ItemScores
from nezha_vllm.item_tokens import ItemTokens
from nezha_vllm.search_memory import Workspace, width_bucket
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.triton_search import Plan

OURS = ("few_request_products", "request_products", "score_children", "select_beams", "context_states", "beam_products")
OF_ITEMS = ("item_products", "rank_items")  # behind the last selection


def random_head(sizes: tuple[int, ...], hidden: int, dtype: torch.dtype, device: str = "cuda") -> DraftHead:
    """Weights that give logits and states of ordinary size, so that beams come from all over the catalogue."""
    torch.manual_seed(0)
    head = DraftHead(hidden, sizes, dtype=dtype).to(device).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(std=hidden**-0.5)
    for parameter in head.code_embeddings.parameters():
        parameter.normal_()
    return head


def random_keys(count: int, capacity: int, device: str = "cuda") -> Tensor:
    """``count`` different integers below ``capacity``, ascending, drawn uniformly where they are wanted."""
    if not 1 <= count <= capacity:
        raise ValueError(f"{count:,} items do not fit on {capacity:,} semantic IDs")
    torch.manual_seed(1)
    if 2 * count > capacity:
        return torch.randperm(capacity, device=device)[:count].sort().values
    drawn = int(-capacity * math.log1p(-count / capacity) * 1.01) + 1000
    keys = torch.randint(capacity, (drawn,), device=device).unique()
    while len(keys) < count:
        keys = torch.cat([keys, torch.randint(capacity, (count,), device=device)]).unique()
    return every(keys, count)  # what is too many is left out evenly


def every(keys_M: Tensor, count: int) -> Tensor:
    """``count`` of the keys, evenly spread."""
    return keys_M[torch.arange(count, device=keys_M.device) * len(keys_M) // count]


def random_items(head: DraftHead, keys_I: Tensor, weight: float = 1.0, dtype: torch.dtype | None = None) -> ItemScores:
    """Item scores of a random model: tokens of all codes, and behind them those of the items with these keys."""
    weights, codec = head.logit_heads[0].weight, SemanticIdCodec(head.codebook_sizes)
    codes = sum(codec.codebook_sizes)
    offsets = np.cumsum((0, *codec.codebook_sizes[:-1]))
    tokens = ItemTokens(keys_I.cpu().numpy(), codes, codec, offsets.tolist())
    torch.manual_seed(3)
    shape = (codes + len(keys_I), weights.shape[1])
    embeddings = torch.empty(shape, dtype=dtype or weights.dtype, device=weights.device)
    return ItemScores(tokens, embeddings.normal_(std=weights.shape[1] ** -0.5), weight)


def prefixes(keys_M: Tensor, plan: Plan) -> tuple[int, ...]:
    """How many different prefixes the catalogue has behind each level."""
    return tuple(1 + int((keys_M[1:] // suffix != keys_M[:-1] // suffix).sum()) for suffix in plan.codec.suffix_sizes)


class SearchCase:
    """N requests of K beams, all stepwise or all final, searched in launches as large as the engine makes them."""

    def __init__(self, plan: Plan, requests: int, width: int, stepwise: bool = True) -> None:
        device = plan.weights.device
        self.plan, self.requests, self.width = plan, requests, width
        self.bucket = width_bucket(width)
        self.step = min(requests, max(1, plan.most_rows // self.bucket))  # requests of a launch
        levels = plan.codec.num_levels
        shape = (requests, levels + 1, plan.hidden_size)
        torch.manual_seed(2)
        self.hidden_NSH = torch.randn(shape, device=device).to(plan.weights.dtype)
        self.work = Workspace(plan, self.step * self.bucket, self.step, [self.bucket])
        self.out = torch.zeros(requests, 2 + self.bucket * (1 + levels), dtype=torch.int32, device=device)
        options = torch.tensor(
            [[width], [int(stepwise)], [1], [0], [0], [0], [-1], [0]], dtype=torch.int32, device=device
        )
        self.options = [options.repeat(1, len(part)) for part in self.hidden_NSH.split(self.step)]
        self.positions: Tensor | None = None
        self.catalogues: Tensor | None = None

    def one_launch(self) -> None:
        """Search the first ``step`` requests."""
        self._search(0)

    def __call__(self) -> None:
        for number in range(len(self.options)):
            self._search(number)

    def _search(self, number: int) -> None:
        part = slice(number * self.step, (number + 1) * self.step)
        arrays = self.options[number], self.out[part], self.bucket, self.positions, self.catalogues
        self.plan.search(self.work, self.hidden_NSH[part], *arrays)

    def geometry(self, level: int) -> tuple[int, int]:
        """Groups a row and their fan, as `select_beams` takes them."""
        found = self.plan.geometry(level, self.bucket)
        return found.groups, found.fan


def reference(head: DraftHead, keys_M: Tensor, case: SearchCase, compiled: bool = False) -> Callable[[], Any]:
    """The same requests through the PyTorch reference, in slices if they are many, as the CPU path does it."""
    search: Any = torch.compile(reference_beam_search) if compiled else reference_beam_search
    drives, items = head.code_drives(), None if case.plan.items is None else case.plan.items.scores
    step = max(1, MAX_SCORES // (case.width * max(head.codebook_sizes)))
    hidden = case.hidden_NSH
    widths_N = torch.full((case.requests,), case.width, device=hidden.device)
    stepwise_N = torch.ones(case.requests, dtype=torch.bool, device=hidden.device)

    def run() -> None:
        for first in range(0, case.requests, step):
            part = slice(first, first + step)
            search(head, hidden[part], keys_M, widths_N[part], stepwise_N[part], drives, item_scores=items)

    return run


def label(names: Iterable[str]) -> list[tuple[str, int]]:
    """Which part of the search each kernel of it is, by name and place: (part, level from 1).

    Whatever is not ours multiplies the beams' states: cuBLAS, by one or more kernels.
    """
    level, labels = 1, []
    for name in names:
        ours = next((part for part in (*OURS, *OF_ITEMS) if part in name), "beam_products")
        part = ours.removeprefix("few_")
        labels.append((part, level))
        if part == "select_beams":
            level += 1
    # behind the selection, of the level that was selected: the next states, and what items add
    behind = ("context_states", *OF_ITEMS)
    return [(part, level - 1 if part in behind else level) for part, level in labels]


def work_of(part: str, level: int, search: floors.Search, case: SearchCase) -> floors.Work:
    """Floor of a labelled part; ``level`` from 1."""
    index = level - 1
    if part == "request_products":
        return floors.request_products(search)
    if part == "beam_products":
        return floors.beam_products(search, index)
    if part == "score_children":
        return floors.score_children(search, index, case.plan.levels[index].table is not None)
    if part == "select_beams":
        return floors.select_beams(search, index, *case.geometry(index))
    if part == "item_products":
        return floors.item_products(search)
    if part == "rank_items":
        return floors.rank_items(search)
    return floors.context_states(search, index)
