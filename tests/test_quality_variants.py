"""Models with and without item tokens, and with either softmax, in quality plans, rows and tables."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import quality_gains
from benchmarks.quality_claims import RIVALS, backbones_table, published_table, sacrifice_tables
from benchmarks.quality_curves import TRAINED, level_rows, search_table, time_lines, time_table, width_rows
from benchmarks.quality_gaps import gaps
from benchmarks.quality_plan import ALONE, Places, Plan, runs
from benchmarks.quality_plots import COLOURS, MARKERS
from benchmarks.quality_rows import planned, read, read_all
from benchmarks.quality_tables import ORDER, make
from nezha_vllm import cli
from nezha_vllm.training.comparison import Comparison
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.results import save_ranks

PLAN = """
methods = ["nezha", "nezha-4", "ar", "mtp", "nezha-plain", "ar-plain"]
seeds = [0]
alone = 3
baselines = ["popularity"]
train = ["--lr", "1e-3", "--item-token-dropout", "0.3"]
[by_method]
ar = ["--lr", "2e-3", "--item-token-dropout", "0"]
nezha-plain = ["--lr", "4e-3"]
[models.tiny]
[models.large]
[datasets.ring]
prepare = []
tokenize = ["--codes", "6"]
[datasets.other-index]
prepare = []
"""
WITH: dict[str, object] = {"item_tokens": 100, "item_loss": 0.3, "item_score_weight": 2.0, "softmax": "codes"}
CODES = WITH | {"item_loss": 0.0, "item_score_weight": 0.0}
PLAIN = {"item_tokens": 0, "item_loss": 0.3, "item_score_weight": 0.0, "softmax": "codes"}
OVER_CATALOGUE = WITH | {"softmax": "catalogue"}
OLD: Mapping[str, object] = {}  # from before there was a choice
NOWHERE = Places(Path(), Path(), Path())


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


@pytest.fixture
def write(tmp_path):
    """Rows of a results file, each a run, method, config and figure, and whatever else is given; as they are read."""
    path = tmp_path / "results.csv"
    columns = ["run", "dataset", "data_hash", "split", "method", "config", "seed", "validity", "beam_width", "targets"]
    columns += [
        "items",
        "exclude_history",
        "ties",
        "commit",
        "hit@5",
        "hit@10",
        "ndcg@5",
        "ndcg@10",
        "hit@500",
        "valid",
    ]

    def of(run, method, config, figure=0.1, **more):
        trained = {"family": "llama", "layers": 2, "hidden": 8, "epochs": 3, "parameters": 7, **(config or {})}
        row = {"run": run, "dataset": run.split("/")[0], "data_hash": "ring's", "split": "test", "method": method}
        row |= {"config": "" if config is None else json.dumps(trained), "seed": 0, "validity": "stepwise"}
        row |= {"beam_width": 20, "targets": 4, "items": 9} | dict.fromkeys(columns[-6:], figure)
        return row | more

    def lines(*rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(of(*row[:3], **row[3]) for row in rows)
        return path

    return lines


def words(plan, method):
    """Of a method's training with the first model."""
    job = next(job for job in runs(Plan.load(plan), NOWHERE) if job.name.startswith(f"ring/tiny/{method}/0/"))
    return job.steps[0].words


def trained(plan, method):
    return cli.build_parser().parse_args(words(plan, method))


def test_a_plain_model_is_trained_as_its_method_without_item_tokens(plan):
    for method in ("nezha", "ar"):
        tokens, plain = trained(plan, method), trained(plan, f"{method}-plain")
        assert (tokens.method, tokens.item_tokens) == (method, None)
        assert (plain.method, plain.item_tokens) == (method, 0)
        assert tokens.out != plain.out
        assert tokens.softmax is plain.softmax is None, "the default, which test_training.py has"
    assert TrainingOptions().item_tokens > 0


def test_a_plain_model_has_rows_of_its_own_but_is_not_asked_alone(plan):
    jobs = runs(Plan.load(plan), NOWHERE)
    named = {job.name.split("/")[2] for job in jobs}
    assert {"nezha-plain", "ar-plain"} < named
    final = [step.run for job in jobs for step in job.steps if step.run.endswith("-final") and ALONE not in step.run]
    assert {run.split("/")[2] for run in final} == {"nezha"}
    beside = [step.words for job in jobs for step in job.steps if "--against" in step.words]
    assert beside
    assert not any("-plain/" in word for step in beside for word in step)


def test_options_of_a_method_come_after_those_of_all(plan):
    found = {method: trained(plan, method) for method in ("nezha", "ar", "mtp", "nezha-plain", "ar-plain")}
    assert {method: one.learning_rate for method, one in found.items()} == {
        "nezha": 1e-3,
        "ar": 2e-3,
        "mtp": 1e-3,
        "nezha-plain": 4e-3,
        "ar-plain": 1e-3,
    }
    assert (found["ar"].item_token_dropout, found["nezha"].item_token_dropout) == (0, 0.3)


def test_a_plan_trains_with_teachers(plan):
    before = trained(plan, "nezha")
    plan.write_text(PLAN.replace("train = [", 'train = ["--teacher", "sasrec", '))
    found = {method: trained(plan, method) for method in ("nezha", "ar")}
    assert all((one.teachers, one.method) == (["sasrec"], method) for method, one in found.items())
    assert found["nezha"].out != before.out
    assert before.teacher_cache is None
    assert {one.teacher_cache for one in found.values()} == {str(NOWHERE.work / "teachers")}


def test_options_of_a_method_make_other_runs_of_that_method_alone(plan):
    before = {job.name for job in runs(Plan.load(plan), NOWHERE)}
    plan.write_text(PLAN.replace('"4e-3"', '"5e-3"'))
    changed = before ^ {job.name for job in runs(Plan.load(plan), NOWHERE)}
    assert {name.split("/")[2] for name in changed} == {"nezha-plain"}


@pytest.mark.parametrize("name", ["magic", "nezha-1", "nezha-4"])
def test_options_of_a_method_that_the_plan_does_not_train_are_refused(plan, name):
    plan.write_text(PLAN.replace("[by_method]", f"[by_method]\n{name} = []"))
    with pytest.raises(ValueError, match=rf"by_method has \['{name}'\], the plan trains \['ar', .*'nezha-plain'\]"):
        Plan.load(plan)


@pytest.mark.parametrize(
    ("method", "config", "more", "said"),
    [
        ("NEZHA", WITH, {}, "NEZHA"),
        ("NEZHA", PLAIN, {}, "NEZHA, no item tokens"),
        ("NEZHA", CODES, {}, "NEZHA, no item scores"),
        ("NEZHA", WITH | {"item_score_weight": 0.0}, {}, "NEZHA"),  # by the validation items
        (
            "NEZHA",
            {"item_tokens": 100, "item_loss": 0.3, "softmax": "catalogue"},
            {},
            "NEZHA, no item scores, softmax over the catalogue",
        ),
        ("NEZHA", OLD, {}, "NEZHA, no item tokens"),
        ("NEZHA", OVER_CATALOGUE, {}, "NEZHA, softmax over the catalogue"),
        (
            "NEZHA",
            OVER_CATALOGUE | PLAIN | {"softmax": "catalogue"},
            {},
            "NEZHA, no item tokens, softmax over the catalogue",
        ),
        ("NEZHA", WITH, {"validity": "final"}, "NEZHA-4, no verification"),
        ("NEZHA", OLD, {"validity": "final"}, "NEZHA-4, no verification, no item tokens"),
        ("language model, beam search", WITH, {"validity": "final"}, "language model, beam search"),
        ("language model, beam search", OLD, {"validity": "final"}, "language model, beam search, no item tokens"),
        ("NEZHA", WITH | {"teachers": ["sasrec"]}, {}, "NEZHA"),
        ("popularity", None, {}, "popularity"),
    ],
)
def test_a_rows_method_says_what_the_model_was_trained_with(method, config, more, said, write):
    [one] = read(write(("ring/tiny/nezha/0/a", method, config, more)))
    assert one.method == said
    assert not one.model or one.method in ORDER


def test_baselines_count_by_their_data_whatever_run_measured_them(plan, write):
    run = next(job.name for job in runs(Plan.load(plan), NOWHERE) if job.name.startswith("ring/tiny/nezha/0/"))
    path = write(
        ("ring/tiny/nezha/0/gone-1", "popularity", None, {"figure": 0.2}),
        ("ring/tiny/nezha/0/gone", "NEZHA", OLD, {}),
        ("ring/tiny/nezha/0/other-1", "item kNN", None, {"data_hash": "another order of ties"}),
        ("nobody/tiny/nezha/0/gone-1", "Markov, first order", None, {}),  # an index of the same sequences
        (run, "NEZHA", WITH, {}),
    )
    assert [one.method for one in read(path, only=planned([plan]))] == ["popularity", "NEZHA"]
    assert len(read(path)) == 5


@pytest.fixture
def both(plan, write, tmp_path):
    """Rows of a plan's models with and without item tokens, and their ranks; NEZHA with them ranks best."""
    labels = {"nezha": ["NEZHA"], "mtp": ["MTP heads"]}
    labels["ar"] = ["language model, beam search", "language model, constrained beam search"]
    rows = [("ring/tiny/nezha/0/gone", "NEZHA", OLD, {"figure": 0.9, "dataset": "beauty-file-order"})]
    for job in runs(Plan.load(plan), NOWHERE):
        dataset, model, method, *_ = job.name.split("/")
        if dataset == "ring" and ": " not in job.name and method != "nezha-4":
            config = PLAIN if method.endswith("-plain") else WITH
            config = config | {"validations": [[1, 3.0, 0.01], [2, 2.0, 0.02]], "train_seconds": 60}
            found = labels[method.removesuffix("-plain")]
            figure = 0.08 if method == "nezha" else 0.03
            rows += [
                (
                    job.name,
                    label,
                    config | {"hidden": 16 if model == "large" else 8},
                    {"figure": figure, "dataset": "beauty-file-order"},
                )
                for label in found
            ]
            ranks = {label: np.full(200, 0 if method == "nezha" else 20) for label in found}
            path = tmp_path / "ranks" / f"{job.name.replace('/', '-')}.npz"
            save_ranks(path, Comparison("ring", "test", 200, 9, False, 5, 9, "v", {}, ranks=ranks))
    return read(write(*rows), only=planned([plan]))


def test_nezha_stands_against_every_method_with_and_without_item_tokens(both, tmp_path):
    kept = tmp_path / "gaps.csv"
    found = gaps(both, tmp_path / "ranks", kept)
    tiny = {gap.method: gap for gap in found if gap.model.startswith("tiny")}
    beams = ("language model, beam search", "language model, constrained beam search")
    assert set(tiny) == {"MTP heads", "NEZHA, no item tokens", *beams, *(f"{beam}, no item tokens" for beam in beams)}
    assert tiny["language model, beam search, no item tokens"].by["Hit@10"].mean == pytest.approx(1)
    assert {gap.key: gap.runs for gap in gaps(both, None, kept)} == {gap.key: gap.runs for gap in found}
    lines = sacrifice_tables(found).splitlines()
    for name in ("beam search", "constrained beam search"):
        for variant in ("", ", no item tokens"):
            [line] = [
                line
                for line in lines
                if line.startswith("| beauty-file-order | tiny") and f"| {name}{variant} |" in line
            ]
            assert "+1.0000 (+1.0000 … +1.0000)" in line
    assert any("NEZHA, no item tokens | MTP" in line for line in lines)
    assert set(tiny) <= set(RIVALS)
    text = make(both, found)
    assert "| language model, beam search, no item tokens | tiny, 3 epochs | 1 | +1.0000" in text


def test_students_stand_beside_their_teacher_and_the_model_that_had_none(write, tmp_path):
    """A model of other epochs stands beside none of them."""
    taught = WITH | {"teachers": ["sasrec"]}
    made = [
        ("tiny/nezha/0/a", "NEZHA", WITH, 8),
        ("tiny/mtp/0/a", "MTP heads", WITH, 8),
        ("tiny/nezha/0/a-b", "SASRec, full cross-entropy", None, 20),
        ("taught/nezha/0/a", "NEZHA", taught, 0),
        ("longer/nezha/0/a", "NEZHA", WITH | {"epochs": 9}, 0),
    ]
    for run, label, _, rank in made:
        path = tmp_path / "ranks" / f"ring-{run.replace('/', '-')}.npz"
        save_ranks(path, Comparison("ring", "test", 200, 9, False, 5, 9, "v", {}, ranks={label: np.full(200, rank)}))
    results = read(write(*((f"ring/{run}", label, config, {}) for run, label, config, _ in made)))
    found = {(gap.model, gap.method): gap.by["Hit@5"].mean for gap in gaps(results, tmp_path / "ranks", tmp_path / "g")}
    student = "taught, 3 epochs, with teachers"
    assert found == {
        ("tiny, 3 epochs", "MTP heads"): 0,
        ("tiny, 3 epochs", "SASRec, full cross-entropy"): 0,
        (student, "SASRec, full cross-entropy"): 1,
        (student, "NEZHA of tiny, 3 epochs"): 1,
    }


def test_the_main_table_has_each_method_beside_itself_without_item_tokens(both):
    lines = [line.split(" | ") for line in make(both).splitlines() if " | tiny, 3 epochs | " in line]
    beams = ("language model, beam search", "language model, constrained beam search")
    expected = [f"{name}{variant}" for name in beams for variant in ("", ", no item tokens")]
    expected += ["MTP heads", "NEZHA", "NEZHA, no item tokens"]
    assert [line[0].removeprefix("| ") for line in lines] == expected
    assert [line[3] for line in lines if line[0].startswith("| NEZHA")] == ["0.0800", "0.0300"]


def test_published_figures_and_backbones_are_beside_nezha_with_item_tokens(both):
    for model in ("tiny", "large"):
        [line] = [line for line in published_table(both).splitlines() if f"**NEZHA**, {model}" in line]
        assert line.endswith("| 1 | 0.0800 | 0.0800 |")
        [line] = [line for line in backbones_table(both).splitlines() if f"| {model}, 3 epochs |" in line]
        assert line.endswith("| 1 | 0.0800 | 0.0300 | 0.0300 | 0.0800 | 0.0300 | 0.0300 |")
    without = [one for one in both if "no item tokens" in one.method]
    assert without
    assert not published_table(without)
    assert not backbones_table(without)


def test_time_has_a_line_for_each_kind_of_model(both):
    [lines] = time_lines(both, {}).values()
    plain = ["NEZHA, no item tokens", "language model, constrained beam search, no item tokens"]
    assert list(lines) == ["NEZHA", "language model, constrained beam search", "MTP heads", *plain]
    assert lines["NEZHA, no item tokens"] == ([0.5, 1], [0.01, 0.02])
    assert "| beauty-file-order | NEZHA, no item tokens | 1.00 |" in time_table({"beauty-file-order": lines})
    assert len(TRAINED) <= min(len(COLOURS), len(MARKERS))


def test_curves_are_of_nezha_with_item_tokens(plan, write):
    path = write(
        ("ring/tiny/nezha/0/a", "NEZHA", OLD, {}),
        ("ring/tiny/nezha/0/b", "NEZHA", WITH, {}),
        ("ring/tiny/nezha/0/b-beam-5-stepwise", "NEZHA", WITH, {"beam_width": 5}),
    )
    assert [one.run[-1] for one in width_rows(read_all(path))] == ["e", "b"]
    [by] = level_rows(read(path), Plan.load(plan)).values()
    assert [one.run for one in by["NEZHA"]] == ["ring/tiny/nezha/0/b"]


def cells(text):
    """Of a table, line by line, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def gained(plan, path, capsys):
    assert quality_gains.main([str(plan), "--results", str(path)]) == 0
    return {(line[0], line[1]): line[2:] for line in cells(capsys.readouterr().out)}


def test_options_that_change_a_rows_name_are_set_against_the_base_of_the_method(tmp_path, write, capsys):
    plan = tmp_path / "search.toml"
    options = 'base = {}\ncodes = { train = ["--softmax", "codes"] }\nno-tokens = { train = ["--item-tokens", "0"] }\n'
    options += 'paper = { train = ["--softmax", "codes", "--item-tokens", "0"] }\n'
    plan.write_text(
        'methods = ["nezha", "ar", "nezha-plain"]\nseeds = [0]\n'
        'order = [{ methods = ["nezha", "ar"] }, { methods = ["nezha-plain"], models = ["base", "codes"] }]\n[models]\n'
        + options
        + "[datasets.ring]\nprepare = []\n"
    )
    configs = {
        "base": OVER_CATALOGUE,
        "codes": WITH,
        "no-tokens": {"item_tokens": 0, "softmax": "catalogue"},
        "paper": PLAIN,
    }
    figures = {"base": 0.04, "codes": 0.05, "no-tokens": 0.02, "paper": 0.03}
    rows = []
    for job in runs(Plan.load(plan), NOWHERE):
        _, option, method, *_ = job.name.split("/")
        label = "language model, constrained beam search" if method == "ar" else "NEZHA"
        config = configs[option] | ({"item_tokens": 0} if method == "nezha-plain" else {})
        figure = figures[option] * {"nezha": 1, "ar": 2, "nezha-plain": 0.5}[method]
        figure = 0.01 if (option, method) == ("paper", "ar") else figure
        rows.append((job.name, label, config, {"figure": figure, "split": "valid"}))
    another = ("ring/base/nezha/0/another", "NEZHA", OVER_CATALOGUE, {"figure": 0.9, "split": "valid", "beam_width": 7})
    path = write(*rows, another)  # the base of another plan
    found = gained(plan, path, capsys)
    shown = [
        line for line in cells(search_table(read_all(path))) if line[1] == "base, 3 epochs" and "NEZHA, s" in line[2]
    ]
    assert [line[3:6] for line in shown] == [["7", "1", "0.9000"], ["20", "1", "0.0400"]]
    constrained = "language model, constrained beam search"
    expected = {("codes", "NEZHA"): "+25.0", ("no-tokens", "NEZHA"): "-50.0", ("paper", "NEZHA"): "-25.0"}
    expected |= {("codes", constrained): "+25.0", ("no-tokens", constrained): "-50.0", ("paper", constrained): "-87.5"}
    expected |= {("codes", "NEZHA, no item tokens"): "+25.0"}
    assert found == {key: [gain, gain] for key, gain in expected.items()}
