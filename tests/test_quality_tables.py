"""Tables of rows that are made up: GPU minutes of shared GPUs, published figures, backbones, verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.quality_claims import backbones_table, published_table, sacrifice_tables
from benchmarks.quality_curves import VARIANTS, width_rows, width_table
from benchmarks.quality_gaps import COLUMNS, METRICS, Gap, gaps
from benchmarks.quality_minutes import EVALUATION, TRAINING, gpu_minutes, total
from benchmarks.quality_rows import OURS, OURS_OVER_CODES, UNVERIFIED, Result
from benchmarks.quality_tables import ORDER, make
from nezha_vllm.ablations import CONSTRAINED_LABEL, FREE_LABEL, LABELS, label
from nezha_vllm.training.significance import Difference


def result(
    run, minute, seconds=60.0, trained=None, dataset="beauty-file-order", method="NEZHA", seed=0, hit=0.1, **more
):
    config = {"family": "llama", "layers": 2, "hidden": 8, "epochs": 3, "method": "nezha", "parameters": 7}
    config |= {"softmax": "catalogue", **more}
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
    ]
    minutes = gpu_minutes(rows)
    assert minutes["a", TRAINING] == pytest.approx(2 + 2 / 2)
    assert minutes["b", TRAINING] == pytest.approx(2 / 2)
    assert minutes["a", EVALUATION] == minutes["b", EVALUATION] == pytest.approx(1 / 2)
    assert minutes["b-final", EVALUATION] == pytest.approx(1)
    assert ("b-final", TRAINING) not in minutes
    assert minutes["c", TRAINING] == pytest.approx(1)
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
        result("e", 1, hit=0.18, method=LABELS["ar"], **large),
    ]
    lines = backbones_table(rows).splitlines()
    small = "| beauty-file-order | llama, 2 layers of 8, 3 epochs | 7 | 1 |"
    large = "| beauty-file-order | llama, 2 layers of 16, 3 epochs | 7 | 1 |"
    assert f"{small} 0.1000 | – | – | – | 0.0500 | – | – | – |" in lines
    assert f"{large} 0.2000 | – | 0.1800 | 0.1500 | 0.1000 | – | 0.0900 | 0.0750 |" in lines
    assert not backbones_table(rows[:2])


def test_a_difference_counts_where_its_interval_leaves_zero():
    above, level, below = Difference(2, 1, 3, 0.01), Difference(1, -1, 3, 0.4), Difference(-2, -3, -1, 0.01)
    by = dict(zip(METRICS, (above, level, level, below), strict=True))
    text = sacrifice_tables([Gap("yelp", "llama", "MTP heads", 3, by, frozenset())])
    assert "| yelp | llama | 1 above, 2 level, 1 below |" in text.splitlines()
    assert sacrifice_tables([]) == ""


def old(run, method, trained, validity="stepwise", **more):
    """A row from before there was a softmax to choose."""
    row = dict(result(run, 1, method=method, **more).row)
    config = json.loads(row["config"]) | {"method": trained}
    del config["softmax"]
    return Result.of(row | {"config": json.dumps(config), "validity": validity})


@pytest.mark.parametrize("method", sorted(set(LABELS) - {"ar"}))
def test_old_rows_are_those_of_models_with_a_softmax_over_all_codes(method):
    assert old("a", LABELS[method], method).method == label(method, "codes") != LABELS[method]
    assert old("a", f"{LABELS[method]}: b", method).method == f"{label(method, 'codes')}: b"
    # of an old checkpoint, evaluated by today's code
    assert old("a", label(method, "codes"), method).method == label(method, "codes")
    assert result("a", 1, method=LABELS[method]).method == LABELS[method]


def test_old_rows_of_the_language_model_and_of_baselines_are_what_they_were():
    assert old("a", FREE_LABEL, "ar", "final").method == FREE_LABEL
    assert old("a", CONSTRAINED_LABEL, "ar").method == CONSTRAINED_LABEL
    assert old("a", "popularity", None, "").method == "popularity"


def test_no_verification_is_of_a_model_with_a_softmax_over_all_codes():
    def final(method, **more):
        return Result.of(dict(result("a", 1, method=method, **more).row) | {"validity": "final"}).method

    assert final(OURS_OVER_CODES, softmax="codes") == old("a", OURS, "nezha", "final").method == UNVERIFIED
    # what was asked of a model in a way that it was not trained for has a line of its own
    assert final(OURS) == "NEZHA, final validity"
    assert final(LABELS["ar"]) == "language model, softmax over the catalogue, final validity"


def test_kept_intervals_of_old_runs_are_not_shown_as_new(tmp_path):
    lines = [f"beauty-file-order,llama,MTP heads,1,{metric},0.1,0.0,0.2,0.01,a b" for metric in METRICS]
    (tmp_path / "gaps.csv").write_text("\n".join([",".join(COLUMNS), *lines]))
    new = [result("a", 1), result("b", 1, method="MTP heads")]
    assert [gap.method for gap in gaps(new, None, tmp_path / "gaps.csv")] == ["MTP heads"]
    before = [old("a", OURS, "nezha"), old("b", "MTP heads", "mtp")]
    for some in (before, [new[0], before[1]], [before[0], new[1]]):
        assert gaps(some, None, tmp_path / "gaps.csv") == []


def test_the_sacrifice_is_measured_against_either_softmax():
    by = dict.fromkeys(METRICS, Difference(1, 0.5, 2, 0.01))
    rivals = [LABELS["ar"], OURS_OVER_CODES, CONSTRAINED_LABEL, FREE_LABEL, UNVERIFIED, label("mtp", "codes")]
    text = sacrifice_tables([Gap("yelp", "llama", name, 3, by, frozenset()) for name in rivals])
    first, second = text.split("\n\n")
    beams = [line.split(" | ")[3] for line in first.splitlines() if "yelp" in line]
    assert beams == ["beam search", "constrained beam search", "beam search, softmax over the catalogue"]
    heads = [cell.strip() for cell in second.splitlines()[0].strip("|").split("|")]
    assert heads[2:] == [*beams, "NEZHA, softmax over all codes", "NEZHA-4"]


def test_every_method_has_its_place_and_nezha_comes_last():
    names = [label(method, softmax) for method in LABELS for softmax in ("codes", "catalogue")]
    assert {FREE_LABEL, UNVERIFIED, *names} <= set(ORDER)
    assert len(set(ORDER)) == len(ORDER)
    shared = {"targets": "3", "items": "9", "exclude_history": "False", "beam_width": "5", "ties": "", "commit": "c"}
    shared |= dict.fromkeys(("hit@5", "ndcg@5", "hit@500", "valid"), "0.1")
    rows = [result(name, 1, method=name) for name in sorted(ORDER)]
    lines = make([Result.of(dict(one.row) | shared) for one in rows]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines if " 3 epochs " in line] == ORDER


def test_beam_widths_have_a_column_for_each_softmax_and_one_without_verification():
    def at(run, width, method, validity="stepwise", softmax="codes", hit=0.1):
        row = result(run, 1, method=method, softmax=softmax, hit=hit).row
        return Result.of(dict(row) | {"split": "test", "beam_width": str(width), "validity": validity, "valid": "0.7"})

    ours, codes = "d/m/nezha/0/h", "d/m/nezha-codes/0/h"
    rows = [
        at(ours, 512, OURS, softmax="catalogue", hit=0.5),
        at(codes, 512, OURS_OVER_CODES, hit=0.4),
        at(f"{codes}-final", 512, OURS_OVER_CODES, "final", hit=0.3),
        at(f"{ours}-beam-9-stepwise", 9, OURS, softmax="catalogue", hit=0.2),
        at(f"{codes}-beam-9-stepwise", 9, OURS_OVER_CODES, hit=0.15),
        at(f"{codes}-beam-9-final", 9, OURS_OVER_CODES, "final", hit=0.05),
        at(f"{ours}-alone-x", 9, OURS, softmax="catalogue", hit=0.9),
    ]
    found = width_rows(rows)
    assert [one.method for one in found] == sorted(VARIANTS) * 2
    lines = width_table(found).splitlines()
    first, second = "0.2000 | 0.1500 | 0.0500", "0.5000 | 0.4000 | 0.3000"
    assert lines[2] == f"| beauty-file-order | 9 | {first} | 0.1000 | 0.0750 | 0.0250 | 0.7000 |"
    assert lines[3] == f"| beauty-file-order | 512 | {second} | 0.2500 | 0.2000 | 0.1500 | 0.7000 |"
