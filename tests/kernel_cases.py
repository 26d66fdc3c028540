"""A search as the kernels' tests ask for it: a head, a catalogue and requests, by the kernels and by the reference."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nezha_vllm.draft_head import Beams, DraftHead, Eligible, reference_beam_search
from nezha_vllm.item_scores import ItemScores

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; tests/test_interpreted.py runs these in Triton's interpreter", allow_module_level=True)

from nezha_vllm import beam  # noqa: E402
from nezha_vllm.search_memory import Workspace, width_bucket  # noqa: E402
from nezha_vllm.triton_search import Plan  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import search_case  # noqa: E402

TOLERANCE = 1e-4


@dataclass
class Case:
    head: DraftHead
    keys_M: torch.Tensor
    hidden_NSH: torch.Tensor
    widths: list[int]
    stepwise: list[bool]
    rules: list[Eligible | None] | None = None
    items: ItemScores | None = None

    def reference(self) -> Beams:
        widths_N = torch.tensor(self.widths, device=DEVICE)
        stepwise_N = torch.tensor(self.stepwise, device=DEVICE)
        return reference_beam_search(
            self.head,
            self.hidden_NSH,
            self.keys_M,
            widths_N,
            stepwise_N,
            eligible=self.rules,
            item_scores=self.items,
        )

    def search(self, left_out: int = 0) -> Beams:
        """Through the kernels; ``left_out`` rows at the end belong to no request."""
        plan = Plan(self.head, self.keys_M, self.items)
        bucket, count = width_bucket(max(self.widths)), len(self.widths)
        rows = [self.widths, [int(flag) for flag in self.stepwise], [1] * (count - left_out) + [0] * left_out]
        nothing = [0] * count
        rows += [nothing, nothing, nothing, [-1] * count, nothing]
        options_8N = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        out = torch.full((count, 2 + bucket * (1 + self.head.num_levels)), 123456, dtype=torch.int32, device=DEVICE)
        plan.search(Workspace(plan, count * bucket, count), self.hidden_NSH, options_8N, out, bucket)
        assert not (out == 123456).any(), "every word of the answer is written"
        return beam.beams_of(out, self.head.num_levels, bucket)


def make(
    sizes: tuple[int, ...],
    keys: int | np.ndarray,
    widths: list[int],
    stepwise: list[bool],
    *,
    hidden: int = 64,
    kind: str = "random",
    seed: int = 0,
    over_catalogue: bool = False,
    known: float | None = None,
) -> Case:
    """``known``: the share of the catalogue's items that have a token; None for a search without item scores."""
    torch.manual_seed(seed)
    head = DraftHead(hidden, sizes).requires_grad_(False).to(DEVICE)
    head.over_catalogue = over_catalogue
    for parameter in head.parameters():
        parameter.normal_(std=0 if kind == "flat" else hidden**-0.5)
    for table in head.code_embeddings:
        table.weight.mul_(hidden**0.5)
    if kind == "twins":  # neighbouring codes cannot be told apart
        for table in [*head.logit_heads, *head.code_embeddings]:
            table.weight.copy_(table.weight[torch.arange(len(table.weight), device=DEVICE) // 2 * 2])
    if isinstance(keys, int):
        keys = np.unique(np.random.default_rng(seed).integers(0, math.prod(sizes), keys))
    states = 2 * torch.randn(len(widths), len(sizes) + 1, hidden, device=DEVICE)
    case = Case(head, torch.from_numpy(keys).to(DEVICE), states, widths, stepwise)
    if known is not None:
        case.items = items_of(case, known, seed)
    return case


def items_of(case: Case, share: float, seed: int = 0, dtype: torch.dtype | None = None) -> ItemScores:
    """Of a model that knows a share of the catalogue's items, and some that the catalogue has not."""
    rng, keys = np.random.default_rng(1000 + seed), case.keys_M.cpu().numpy()
    others = np.setdiff1d(rng.integers(0, math.prod(case.head.codebook_sizes), 50), keys)
    tokens = np.union1d(rng.choice(keys, round(share * len(keys)), replace=False), others)
    tokens = tokens if len(tokens) else keys[:1]  # a model with item scores has some
    return search_case.random_items(case.head, torch.from_numpy(tokens), 0.7, dtype)


def assert_same(found: Beams, expected: Beams, tolerance: float = TOLERANCE) -> None:
    """Counts and scores rank by rank; items too, wherever the scores around are further apart than the tolerance."""
    assert found.valid_N.tolist() == expected.valid_N.tolist()
    assert found.drafted_N.tolist() == expected.drafted_N.tolist()
    for request, valid in enumerate(expected.valid_N.tolist()):
        assert (found.index_NK[request, valid:] == -1).all()
        scores, others = found.scores_NK[request, :valid], expected.scores_NK[request, :valid]
        assert torch.allclose(scores, others, atol=tolerance, rtol=0)
        items, reference = found.index_NK[request, :valid].tolist(), expected.index_NK[request, :valid].tolist()
        assert len(set(items)) == valid
        place = {item: rank for rank, item in enumerate(reference)}
        for rank, item in enumerate(items):
            score = float(others[place[item]]) if item in place else float(others[-1])
            assert abs(score - float(others[rank])) <= 2 * tolerance, f"request {request}, rank {rank}: item {item}"


# no larger than it takes: the interpreter needs a second for every 20 beams of a search
SHAPES = [
    ((16, 24, 32), 1000, [10, 50, 1], [True, False, True]),
    ((7, 13, 5, 3), 300, [20, 2], [True, False]),
    # weird shapes: one level, one code, one key, wider than the catalogue, sizes that are no powers of two, 8 levels
    ((50,), 20, [3, 100], [True, False]),
    ((1, 5, 1), 4, [2, 16], [True, True]),
    ((64, 64), 1, [10], [True]),
    ((3, 4), 12, [512], [True]),
    ((300, 33, 100), 5000, [12, 1, 7], [True, False, True]),
    ((2, 3, 2, 3, 2, 3, 2, 3), 900, [9, 20], [True, False]),
    ((5, 2000, 3), 800, [13], [True]),
]
# both modes in one launch; a level that is certain, one code, a beam as wide as the catalogue
OVER_CATALOGUE = [
    ((7, 13, 5), 40, [20, 3, 40], [True, False, True]),
    ((1, 5, 1), 4, [2, 16], [True, False]),
    ((64, 64), 1, [3], [True]),
]
