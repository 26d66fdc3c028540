"""Rows of the draft stage and of a profile: what is measured in one run, and which rows stand beside each other."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import kernels, search_case
from benchmarks.choose import of_each_gpu
from benchmarks.machine import ROOT
from benchmarks.rows import Row, append
from benchmarks.run import CommandStep, Plan
from benchmarks.tables import make_tables

STAGE = {"benchmark": "kernels", "system": "triton", "part": "draft stage", "dtype": "bfloat16", "vllm": "0.32.0"}
STAGE |= {"levels": 3, "codes": 512, "hidden": 2048, "items": 7000, "beam_width": 10, "concurrency": 1}


@pytest.fixture
def stage(tmp_path):
    """Writes a row of the draft stage: µs, items with a token, and where and when it was measured."""

    def add(us, known=0, commit="abc", gpu="GPU A", day=1, hour=9, minute=0, **more):
        settings = f"{known} item tokens" if known else ""
        where = {"gpu": gpu, "commit": commit, "date": f"2026-01-{day:02}T{hour:02}:{minute:02}:00+00:00"}
        where |= {
            "ceiling_gb_per_s": 3000.0 + minute,
            "ceiling_tflop_per_s": 700.0,
            "cold_us": 2 * us,
            "floor_us": us / 10,
        }
        append("kernels", Row(**STAGE | where | {"us": us, "settings": settings} | more), tmp_path)

    return add


@pytest.fixture
def measured(monkeypatch):
    """Runs `benchmarks.kernels` on a CPU, all but the timing; returns each cell with its search plan."""
    for name in ("random_head", "random_keys"):
        monkeypatch.setattr(search_case, name, partial(getattr(search_case, name), device="cpu"))

    def run(*argv):
        found = []
        monkeypatch.setattr(kernels, "measure_cell", lambda recorder, head, plan, cell: found.append((cell, plan)))
        arguments = kernels.make_parser().parse_args(argv)
        sizes = (arguments.codes,) * arguments.levels
        recorder = SimpleNamespace(arguments=arguments, sizes=sizes, dtype=torch.float32, late=lambda: False)
        kernels.measure_grid(recorder)
        return found

    return run


def test_one_run_measures_the_stage_with_and_without_item_scores(measured):
    """The plan's own step, over a smaller catalogue."""
    [step] = [step for step in Plan.load(ROOT / "benchmarks/plans/h100.toml").steps if step.name == "kernels-scores"]
    assert isinstance(step, CommandStep)
    found = measured(*step.command[1:], "--items", "60", "90", "--codes", "8", "--hidden", "64")
    places = [(items, width, batch) for items in (60, 90) for width in (10, 512) for batch in (1, 64)]
    for scored in (False, True):
        same = [(cell, plan) for cell, plan in found if (plan.items is not None) is scored]
        assert [(cell["items"], cell["beam_width"], cell["concurrency"]) for cell, _ in same] == places
        for cell, plan in same:
            assert plan.num_keys == cell["items"]
            assert cell.get("settings", "") == (f"{cell['items']} item tokens" if scored else "")
    catalogues = {(cell["items"], tuple(plan.keys.tolist())) for cell, plan in found}
    assert len(catalogues) == 2, "with and without are of the same items"


def test_item_scores_of_more_items_than_there_are_are_measured_once(measured):
    grid = ["--widths", "10", "--batches", "1", "--codes", "8", "--hidden", "64", "--items", "60"]
    found = measured(*grid, "--item-tokens", "20", "60", "1000")
    assert [len(plan.items.scores.keys) for _, plan in found] == [20, 60]
    [(_, plan)] = measured(*grid)
    assert plan.items is None


ITEM_SCORES = """L = 3, T = 512, H = 2048, bfloat16

| items | with a token | beam width | requests | µs, warm L2 | with item scores | added | µs, cold L2 | with item scores | added | floor with them |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 7,000 | 500 | 10 | 1 | 40.0 | 44.0 | 4.0 | 80.0 | 88.0 | 8.0 | 4.4 |
| 7,000 | 7,000 | 10 | 1 | 40.0 | 45.0 | 5.0 | 80.0 | 90.0 | 10.0 | 4.5 |

GPU A; vLLM 0.32.0; commit abc; 2026-01-03; measured ceilings 3,000 GB/s and 700 TFLOP/s."""  # noqa: E501


def test_what_item_scores_add_is_a_difference_within_one_hour(stage, tmp_path):
    stage(70.0, known=7000, day=2)
    assert "item-scores" in make_tables(tmp_path)
    for other in ({"commit": "old"}, {"hour": 8}, {"gpu": "GPU B"}, {"beam_width": 50}, {"items": 8000}):
        stage(10.0, day=2, **other)
    lonely = "| 7,000 | 7,000 | 10 | 1 | – | 70.0 | – | – | 140.0 | – | 7.0 |"
    assert lonely in make_tables(tmp_path)["item-scores"]
    stage(40.0, day=3, minute=59)
    stage(44.0, known=500, day=3)
    stage(45.0, known=7000, day=3)
    stage(50.0, known=7000, commit="later", day=4)  # alone
    stage(39.0, commit="last", day=5)  # alone, too, and the newest without them
    found = make_tables(tmp_path)
    assert found["item-scores"] == ITEM_SCORES
    assert "| 7,000 | 10 | 1 | 39.0 |" in found["kernels"]


def test_a_profile_is_shown_of_every_gpu(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    from benchmarks.timeline import draw_timeline

    part = {"benchmark": "profile", "system": "nezha", "model": "m", "part": "gpu: attention", "engine_tokens": 131}
    part |= {"beam_width": 10, "n": 5, "launches": 16.0, "vllm": "0.32.0"}
    for gpu, us, day in [("GPU A 2", 100.0, 1), ("GPU A 2", 200.0, 2), ("GPU A", 300.0, 3)]:
        append("profile", Row(**part, gpu=gpu, us=us, date=f"2026-01-0{day}"), tmp_path)
    timeline = {"gpu": "GPU A 2", "vllm": "0.32.0", "commit": "abc", "model": "m", "prompt_tokens": 131, "n": 5}
    timeline |= {"beam_width": 10, "steps": [["schedule", 0, 200, 0]], "kernels": [["attention", 300, 500]]}
    file = tmp_path / "timeline-m-128-10.json"
    file.write_text(json.dumps(timeline))
    table = make_tables(tmp_path)["profile-gpu"]
    assert [us for us in ("100.0", "200.0", "300.0") if f"| attention | {us} |" in table] == ["200.0", "300.0"]
    assert table.count("**m**, 131 tokens") == 2
    assert [row.us for row in of_each_gpu(tmp_path, "profile", gpu="GPU A 2")] == [200.0]
    bars = draw_timeline(file, of_each_gpu(tmp_path, "profile")).axes[1].patches
    assert [bar.get_width() for bar in bars] == [200.0], "bars are of the timeline's GPU"
    drawn = [path.name for path in plots.draw_all(tmp_path, tmp_path / "images", gpu="GPU A", vllm="0.32")]
    assert drawn == ["timeline-m-128-10.svg"]
