"""Tables of rows that are made up: GPU minutes of shared GPUs, published figures, backbones, verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.quality_claims import backbones_table, published_table, sacrifice_tables
from benchmarks.quality_gaps import METRICS, Gap
from benchmarks.quality_minutes import EVALUATION, TRAINING, gpu_minutes, total
from benchmarks.quality_rows import Result
from nezha_vllm.training.significance import Difference


def result(
    run, minute, seconds=60.0, trained=None, dataset="beauty-file-order", method="NEZHA", seed=0, hit=0.1, **more
):
    config = {"family": "llama", "layers": 2, "hidden": 8, "epochs": 3, "method": method, "parameters": 7}
    config |= {"item_tokens": 5, "item_loss": 0.3, "item_score_weight": 1.0, **more}
    config |= {"train_seconds": trained} if trained else {}
    row = {
        "run": run,
        "date": f"2026-01-01T00:{minute:02}:00+00:00",
        "seconds": str(seconds),
        "dataset": dataset,
        "method": method,
        "seed": str(seed),
        "config": json.dumps(config),
        "validity": "stepwise",
        "hit@10": str(hit),
        "ndcg@10": str(hit / 2),
    }
    return Result.of(row)


def test_a_shared_gpu_is_divided_among_those_at_work():
    rows = [
        result("a", 10, trained=240, seed=0),  # trains 5 … 9, evaluates to 10
        result("b", 10, trained=120, seed=1),  # trains 7 … 9, evaluates to 10
        result("b", 10, seconds=0.0, trained=120, seed=1),  # another decoding of the same checkpoint
        result("b-final", 11, trained=120, seed=1),  # alone, nothing is trained
        result("c", 10, trained=60, seed=2, gpu="1"),  # on another GPU
        result("d", 10, trained=60, seed=3, device="cpu"),
        result("e", 30, trained=120, seed=1, item_tokens=0),  # b's seconds, but another training
        result("f", 40, trained=120, seed=1, item_loss=0.0),
        result("g", 58, trained=120, seed=4, trained_until="2026-01-01T00:52:00+00:00"),  # evaluated later
        result("h", 52, seconds=60.0),
    ]
    minutes = gpu_minutes(rows)
    assert minutes["a", TRAINING] == pytest.approx(2 + 2 / 2)
    assert minutes["b", TRAINING] == pytest.approx(2 / 2)
    assert minutes["a", EVALUATION] == minutes["b", EVALUATION] == pytest.approx(1 / 2)
    assert minutes["b-final", EVALUATION] == pytest.approx(1)
    assert ("b-final", TRAINING) not in minutes
    assert minutes["e", TRAINING] == minutes["f", TRAINING] == pytest.approx(2)
    assert minutes["c", TRAINING] == pytest.approx(1)
    assert minutes["g", TRAINING] == pytest.approx(1 + 1 / 2)
    assert not total(minutes, ["d"])
    assert total(minutes, ["a", "b"]) == pytest.approx(5)
    assert total(minutes, ["a", "b"], TRAINING) == pytest.approx(4)


def test_published_figures_stand_beside_the_mean_of_seeds():
    rows = [result("a", 1, hit=0.08), result("b", 1, seed=1, hit=0.09), result("c", 1, dataset="yelp")]
    lines = [line for line in published_table(rows).splitlines() if "beauty-file-order" in line]
    assert lines[0] == "| beauty-file-order | **NEZHA**, llama, 2 layers of 8, 3 epochs | 2 | 0.0850 | 0.0425 |"
    assert lines[1] == "| beauty-file-order | RPG | published | 0.0809 | 0.0464 |"
    assert published_table(rows[2:]) == ""


def test_backbones_are_compared_on_the_seeds_that_all_have():
    small, large = {"hidden": 8}, {"hidden": 16}
    rows = [
        result("a", 1, hit=0.10, **small),
        result("b", 1, seed=1, hit=0.90, **small),
        result("c", 1, hit=0.20, **large),
        result("d", 1, hit=0.15, method="MTP heads", **large),
    ]
    lines = backbones_table(rows).splitlines()
    assert "| beauty-file-order | llama, 2 layers of 8, 3 epochs | 7 | 1 | 0.1000 | – | – | 0.0500 | – | – |" in lines
    assert (
        "| beauty-file-order | llama, 2 layers of 16, 3 epochs | 7 | 1 | 0.2000 | – | 0.1500 | 0.1000 | – | 0.0750 |"
        in lines
    )
    assert not backbones_table(rows[:2])


def test_a_difference_counts_where_its_interval_leaves_zero():
    above, level, below = Difference(2, 1, 3, 0.01), Difference(1, -1, 3, 0.4), Difference(-2, -3, -1, 0.01)
    by = dict(zip(METRICS, (above, level, level, below), strict=True))
    text = sacrifice_tables([Gap("yelp", "llama", "MTP heads", 3, by, frozenset())])
    assert "| yelp | llama | 1 above, 2 level, 1 below |" in text.splitlines()
    assert sacrifice_tables([]) == ""
