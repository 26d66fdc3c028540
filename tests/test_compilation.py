"""Kernels compile for a Hopper GPU, which takes no GPU: the interpreter accepts what the compiler does not."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nezha_vllm.draft_head import DraftHead

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed

pytestmark = pytest.mark.slow
SHARED_MEMORY = 232_448  # bytes a program can have
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Launches become compilations for compute capability 9.0; their names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)

    def launch(self: JITFunction, grid: tuple[int, ...]):
        def run(*args: object, **options: object) -> None:
            kernel = self.warmup(*args, grid=grid, **options)
            assert kernel.metadata.shared <= SHARED_MEMORY, (
                f"{self.fn.__name__} asks for {kernel.metadata.shared} bytes"
            )
            names.append(self.fn.__name__)

        return run

    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "width", "requests", "over_catalogue", "with_items"),
    [
        ((512, 512, 512), 512, 1, False, False),
        ((512, 512, 512), 512, 1, False, True),
        ((300, 40), 16, 20, True, True),
        ((65, 3000, 2, 7), 64, 2, True, False),
    ],
)
def test_a_search_compiles(
    compiled: list[str],
    sizes: tuple[int, ...],
    width: int,
    requests: int,
    over_catalogue: bool,
    with_items: bool,
    dtype: torch.dtype,
) -> None:
    from benchmarks.search_case import random_items
    from nezha_vllm.search_memory import Workspace
    from nezha_vllm.triton_search import Plan

    head = DraftHead(128, sizes, dtype=dtype).requires_grad_(False)
    head.over_catalogue = over_catalogue
    keys = torch.from_numpy(np.unique(np.random.default_rng(0).integers(0, math.prod(sizes), 500)))
    plan = Plan(head, keys, random_items(head, keys[::2]) if with_items else None)
    plan.search(
        Workspace(plan, requests * width, requests),
        torch.zeros(requests, len(sizes) + 1, 128, dtype=dtype),
        torch.ones(8, requests, dtype=torch.int32),
        torch.zeros(requests, 2 + width * (1 + len(sizes)), dtype=torch.int32),
        width,
    )
    assert compiled.count("select_beams") == compiled.count("score_children") == len(sizes)
    assert compiled.count("item_products") == compiled.count("rank_items") == int(with_items)
    assert compiled.count("beam_products") == compiled.count("context_states") == len(sizes) - 1
