"""Benchmarks: rows, floors, tables and workloads are right; the measurements run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import floors
from benchmarks.gpu_parts import backbone_work, sort_kernels
from benchmarks.host_steps import HostSteps
from benchmarks.profile import by_part

PAPER = floors.Search(requests=1, width=512, sizes=(512, 512, 512), hidden=2048)


def test_floor_of_the_papers_shapes_by_hand():
    """3 levels of 512 codes, H = 2048, K = 512, bfloat16."""
    weights = (3 * 512 + 2 * 2048) * 2048 * 2  # W_1 … W_3, W_hh,1 and W_hh,2: 22 MiB
    states, answer = 4 * 2048 * 2, 4 * (2 + 512 * 4)
    code_drives = (512 + 1) * 2048 * 2  # 512 children of the root have 512 codes; those behind them at least one
    work = floors.stage(PAPER)
    assert work.bytes == weights + states + answer + code_drives
    by_request = 2 * 2048 * (3 * 512 + 2048)
    by_beams = 2 * 512 * 2048 * (512 + 2048) + 2 * 512 * 2048 * 512
    assert work.flops == by_request + by_beams
    assert work.flops == pytest.approx(6.46e9, rel=1e-3)
    assert work.floor_us(floors.Ceilings(3000, 800)) == pytest.approx(8.4, abs=0.05)  # by bytes
    assert work.floor_us(floors.Ceilings(3000, 600)) == pytest.approx(10.8, abs=0.05)  # by operations


def test_floors_of_kernels_by_hand():
    level_2 = floors.beam_products(PAPER, 1)
    assert level_2.flops == 2 * 512 * 2048 * 2560
    assert level_2.bytes == 2560 * 2048 * 2 + 512 * 2048 * 2 + 512 * (512 * 4 + 2048 * 2)
    assert floors.beam_products(PAPER, 2).flops == 2 * 512 * 2048 * 512  # no next state behind the last level
    assert floors.request_products(PAPER).bytes == 3584 * 2048 * 2 + 4 * 2048 * 2 + 3584 * 4
    assert floors.score_children(PAPER, 0).bytes == 2 * 512 * 4  # one row, the root's
    assert floors.score_children(PAPER, 1).bytes == 2 * 512 * 512 * 4 + 512 * 4
    assert floors.score_children(PAPER, 1, table=True).bytes == 2 * 512 * 512 * 4 + 512 * 4 + 512 * 513 * 4
    assert floors.context_states(PAPER, 0).bytes == 512 * 4096 + 2048 * 4 + 512 * 4096
    assert floors.select_beams(PAPER, 1, groups=8, fan=8).bytes == (512 * 8 + 2 * 512 * 8) * 4 + 512 * 24


def test_a_floor_knows_how_many_beams_a_catalogue_allows():
    few = floors.Search(requests=2, width=4096, sizes=(512, 512, 512), hidden=64, prefixes=(500, 900, 1000))
    assert [few.beams(level) for level in range(4)] == [1, 500, 900, 1000]
    assert floors.beam_products(few, 1).flops == 2 * 2 * 500 * 64 * (512 + 64)


def test_kernels_are_sorted_into_parts_and_waiting_is_counted_once():
    kernels = sort_kernels(
        [
            ("_fill_step_inputs", 0, 2),
            ("nvjet_tst_64x8", 3, 10),
            ("void cutlass::device_kernel<flash::enable_sm90<…>>", 14, 4),
            ("triton_red_fused_rms_norm", 18, 2),
            ("Memcpy HtoD (Pinned -> Device)", 20, 1),
            ("vectorized_gather_kernel", 21, 1),
            ("few_request_products", 22, 5),
            ("score_children", 23, 6),  # launched early, waits for the one before it
            ("select_beams", 29, 1),
            ("nvjet_hsh_128x256", 30, 7),
        ]
    )
    assert [kernel.part for kernel in kernels] == [
        "input kernel",
        "linear layers",
        "attention",
        "norms, activations, rotary",
        "copies",
        "gather of states",
        "draft: request_products",
        "draft: score_children",
        "draft: select_beams",
        "draft: beam_products",
    ]
    assert kernels[7].own == 2
    parts = {part: us for part, us, _ in by_part([kernels])}
    assert parts["draft stage"] == 5 + 2 + 1 + 7


def test_floor_of_a_backbone_by_hand():
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    config = SimpleNamespace(**shape, num_attention_heads=32, num_key_value_heads=8)
    work = backbone_work(config, tokens=128)["linear layers"]
    weights = 16 * (2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192)  # Llama 3.2 1B without its embeddings
    assert work.bytes == 2 * weights == 1_946_157_056
    assert work.flops == 2 * 128 * weights


def test_steps_of_the_host_add_up():
    steps = HostSteps()
    outer = steps._timed("schedule", lambda: inner())
    inner = steps._timed("gather", lambda: time.sleep(0.002))
    for _ in range(3):
        steps.request(outer)
    found = steps.medians()
    assert list(found) == ["schedule", "gather", "everything else"]
    assert found["gather"][0] >= 2000 > found["schedule"][0]
    for request in steps.requests:
        assert sum(request.own_us.values()) == pytest.approx(request.total_us)
