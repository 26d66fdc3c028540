"""Benchmarks: rows, floors, tables and workloads are right; the measurements run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import floors

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
