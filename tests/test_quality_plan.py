"""The plan of quality runs: its commands work, what is done is not done again, time limits hold, tables are made."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import quality_gains, quality_gaps, quality_rows, quality_tables
from benchmarks.machine import ROOT
from benchmarks.quality import Runner, joined, load, main
from benchmarks.quality_plan import Job, Places, Plan, Step, finished_runs, is_done, preparations, remaining, runs
from nezha_vllm import cli

PLAN = """
methods = ["nezha", "nezha-4", "ar"]
seeds = [0, 1]
curve = [5]
alone = 3
baselines = ["popularity"]
train = ["--epochs", "1", "--max-history", "6"]
evaluate = ["--beam-width", "20"]
[models.tiny]
train = ["--hidden", "32", "--layers", "1", "--heads", "1"]
[datasets.ring]
prepare = ["--table", "{data}/ring.csv", "--min-user", "3"]
tokenize = ["--codes", "6", "--text", "none", "--components", "0"]
"""


@pytest.fixture
def places(tmp_path):
    rows = [f"u{user},i{(user * 7 + turn) % 30:02},{turn}" for user in range(40) for turn in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ring.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    return Places(tmp_path / "data", tmp_path / "work", tmp_path / "quality.csv")


def plan_of(tmp_path, text=PLAN):
    (tmp_path / "plan.toml").write_text(text)
    return Plan.load(tmp_path / "plan.toml")


def test_a_plan_runs_from_raw_files_to_tables(places, tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = plan_of(tmp_path)
    jobs = runs(plan, places)
    named = [job.name.split("/", 2)[2] for job in jobs]
    kinds = [(name.rsplit("/", 1)[0], name.partition(": ")[2]) for name in named]
    beside = [("nezha/0", ""), ("nezha/0", "baselines"), ("ar/0", "")]
    assert kinds == [*beside, ("nezha/1", ""), ("ar/1", ""), ("nezha/0", "widths"), ("nezha/0", "alone")]
    for job in [*preparations(plan, places), *jobs]:
        left = remaining(job, finished_runs(places.results))
        # what is measured beside a model finds its checkpoint
        beside = ": " in job.name and "/" in job.name
        assert left == ([step for step in job.steps if step.run] if beside else job.steps)
        for step in left:
            assert cli.main(step.words) == 0
            assert is_done(step, finished_runs(places.results))
    torch.set_num_threads(before)
    with places.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # popularity once, beside NEZHA again; NEZHA, NEZHA-4 and the language model's two decodings by seed; two widths;
    # once more the four, one user at a time
    assert len(rows) == 2 + 2 * 4 + 2 + 4
    assert {row["beam_width"] for row in rows} == {"20", "5"}
    notes = [json.loads(row["config"]) for row in rows if row["validity"]]
    assert all(note["train_seconds"] > 0 and [one[0] for one in note["validations"]] == [1] for note in notes)
    assert all(json.loads(row["config"])["trained_until"] <= row["date"] for row in rows if row["validity"])
    results = quality_rows.read(places.results)
    kept = quality_gaps.kept_at(places.results)
    gaps = quality_gaps.gaps(results, places.work / "ranks", kept)
    text = quality_tables.make(results, gaps)
    # without ranks the same comes from what was kept, unless runs are others
    assert quality_tables.make(results, quality_gaps.gaps(results, None, kept)) == text
    assert not quality_gaps.gaps([one for one in results if one.seed], None, kept)
    lines = text.splitlines()
    assert any(line.startswith("| NEZHA-4, no verification | tiny, 1 epochs | 2 |") for line in lines)
    ours = [one for one in results if one.method == "NEZHA"]
    mean = sum(one.number("hit@10") for one in ours) / 2
    assert any(line.startswith("| NEZHA | tiny, 1 epochs | 2 |") and f"{mean:.4f}" in line for line in lines)
    gap = next(line for line in lines if line.startswith("| popularity | tiny, 1 epochs | 2 |"))
    theirs = next(one for one in results if one.method == "popularity").number("hit@10")
    assert f"{mean - theirs:+.4f} (" in gap
    marks = ("quality", "quality-sacrifice", "quality-widths", "quality-levels", "quality-time", "quality-latency")
    page = "".join(f"<!-- benchmarks:{mark} begin -->\nold\n<!-- benchmarks:{mark} end -->\n" for mark in marks)
    (tmp_path / "page.md").write_text(page)
    capsys.readouterr()
    where = ["--document", str(tmp_path / "page.md"), "--levels", str(tmp_path / "plan.toml")]
    quality_tables.main(["--results", str(places.results), "--plans", str(tmp_path / "plan.toml"), *where])
    page = (tmp_path / "page.md").read_text()
    assert "old" not in page
    for begin in ("### ring", "| ring | 5 | ", "| ring | 20 | ", "| 3 × 6 | 2 | ", "| ring | NEZHA | 20 | "):
        assert begin in page
    assert page.count("| 2 | beam search | ") == page.count("| ring | NEZHA-4, no verification | 20 | ") == 1
    for picture in ("widths", "levels", "time"):
        assert (tmp_path / "images" / f"quality-{picture}.svg").is_file()
    # measured is measured, also where nothing but the results was kept
    shutil.rmtree(places.work / "models")
    assert not any(remaining(job, finished_runs(places.results)) for job in jobs)
    # another option makes other runs; what does not depend on it stays
    changed = replace(plan, train=["--epochs", "2"])
    assert not any(is_done(step, finished_runs(places.results)) for job in runs(changed, places) for step in job.steps)
    assert all(is_done(step, set()) for job in preparations(changed, places) for step in job.steps)


def shell(steps):
    return ["sh", "-c", "\n".join(["set -e", *(step.words[0] for step in steps)])]


def job_of(places, name, script, made):
    return Job(name, [Step([script.format(made=shlex.quote(str(made)))], made)])


def runner(places, processes=2, seconds=20.0):
    return Runner(places, processes, time.monotonic() + seconds, shell, lambda line: None)


def test_jobs_share_the_machine_and_run_once(places, tmp_path):
    script = "echo $$ >> {made}.starts; sleep 0.5; touch {made}"
    jobs = [job_of(places, f"job {n}", script, tmp_path / f"made{n}") for n in range(4)]
    started = time.monotonic()
    assert runner(places, processes=4).run(jobs)
    assert time.monotonic() - started < 4 * 0.5 + 0.5
    assert runner(places).run(jobs)
    assert all(len((tmp_path / f"made{n}.starts").read_text().split()) == 1 for n in range(4))


def test_a_job_goes_on_at_the_step_it_lacks(places, tmp_path):
    made = [tmp_path / "one", tmp_path / "two"]
    job = Job("job", [Step([f"echo x >> {path}"], path) for path in made])
    made[0].write_text("before\n")
    assert runner(places).run([job])
    assert [path.read_text() for path in made] == ["before\n", "x\n"]


def test_jobs_that_lack_the_same_file_are_not_at_work_at_one_time(places, tmp_path):
    """Students whose teacher has its row, but no checkpoint any more."""
    shared = tmp_path / "teacher"
    teach = Step([f"test ! -e {shared}.part && touch {shared}.part && sleep 0.5 && mv {shared}.part {shared}"], shared)
    made = [tmp_path / f"student{n}" for n in range(3)]
    found = runner(places, processes=3)
    assert found.run([Job(path.name, [teach, Step([f"test -f {shared} && touch {path}"], path)]) for path in made])
    assert not found.failed
    assert all(path.exists() for path in made)


def test_a_job_waits_for_its_data_and_fails_with_them(places, tmp_path):
    made = [tmp_path / f"made{n}" for n in range(4)]
    slow = job_of(places, "slow", "sleep 0.5; touch {made}", made[0])
    bad = job_of(places, "bad", "exit 1", made[1])
    after_slow = replace(job_of(places, "reader", f"test -f {made[0]} && touch {{made}}", made[2]), after=("slow",))
    after_bad = replace(job_of(places, "orphan", "touch {made}", made[3]), after=("bad",))
    found = runner(places, processes=3)
    assert found.run([after_slow, after_bad, slow, bad])
    assert found.failed == ["bad", "orphan"]
    assert [path.exists() for path in made] == [True, False, True, False]


def test_failures_are_named_and_stop_no_other_job(places, tmp_path):
    bad = job_of(places, "bad", "echo why; exit 3", tmp_path / "never")
    idle = job_of(places, "idle", "true", tmp_path / "neither")
    good = job_of(places, "good", "touch {made}", tmp_path / "made")
    found = runner(places, processes=1)
    assert found.run([bad, idle, good])
    assert found.failed == ["bad", "idle"]
    assert (tmp_path / "made").is_file()
    assert (places.work / "logs" / "bad.log").read_text() == "why\n"


def test_nothing_runs_beside_a_job_that_is_to_be_alone(places, tmp_path):
    script = "date +%s.%N > {made}.begin; sleep 0.4; date +%s.%N > {made}"
    jobs = [job_of(places, f"job {n}", script, tmp_path / f"made{n}") for n in range(4)]
    jobs[2] = replace(jobs[2], alone=True)
    assert runner(places, processes=4).run(jobs)
    ends = [float((tmp_path / f"made{n}").read_text()) for n in range(4)]
    begins = [float((tmp_path / f"made{n}.begin").read_text()) for n in range(4)]
    assert begins[1] < ends[0]
    assert max(ends[:2]) <= begins[2]
    assert ends[2] <= begins[3]


def test_a_job_that_hangs_gives_its_place_away(places, tmp_path):
    hangs = job_of(places, "hangs", "sleep 30", tmp_path / "never")
    good = job_of(places, "good", "touch {made}", tmp_path / "made")
    found = runner(places, processes=1)
    found.longest = 0.5
    assert found.run([hangs, good])
    assert found.failed == ["hangs"]
    assert (tmp_path / "made").is_file()


def test_when_the_time_is_up_children_of_children_are_stopped(places, tmp_path):
    script = "(sleep 1.5; touch {made}) & wait"
    started = time.monotonic()
    assert not runner(places, seconds=0.5).run([job_of(places, "long", script, tmp_path / "made")] * 3)
    assert time.monotonic() - started < 1.4
    time.sleep(1.6)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"ar"]', '"magic"]'), "not \\['magic'\\]"),
        (("seeds = [0, 1]", "seeds = []"), "there must be seeds"),
        (("[models.tiny]", "[models.tiny]\nlayers = 3"), "models.tiny has \\['layers'\\]"),
        (("[models.tiny]", "order = [{ seeds = [7] }]\n[models.tiny]"), "order has seeds = \\[7\\]"),
        (("seeds =", "sedes ="), "sedes"),
        (("methods = [", "methods = "), "plan.toml"),
        (('"--epochs", "1"', '"--epochs", 1'), "train is \\['--epochs', 1, .*\\], must be a list of texts"),
        (('"--heads", "1"]', '"--heads"]\n[by_method]\nar = "--lr"'), "by_method.ar is --lr, must be a list of texts"),
        (('"--heads", "1"]', '"--teacher", "{model:tiny}"]'), "models.tiny has \\['{model:tiny}'\\], may have one"),
        (
            ("[models.tiny]", '[models.a]\n[models.b]\ntrain = ["{model:a}", "{model:a}"]\n[models.tiny]'),
            "may have one",
        ),
        (("[models.tiny]", '[models.a]\n[models.b]\ntrain = ["--teacher={model:a}"]\n[models.tiny]'), "may have one"),
        (('"--epochs", "1"', '"--teacher", "{model:tiny}"'), "train has {model:…}, which has a meaning"),
    ],
)
def test_a_wrong_plan_says_where(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plan_of(tmp_path, PLAN.replace(*change))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quality.toml", 6 + (5 * 3 * (11 + 1 + 6) + 2 * 3 * 3 + 2 + 1) + 6 + 6),
        ("quality-search.toml", 49 + 97),
        ("quality-items.toml", 15 + 94),
        ("quality-curves.toml", 3 + 3),
        ("quality-teachers.toml", 4 + 4 * (13 + 2)),
    ],
)
def test_the_repositorys_plans_have_commands_that_exist(name, count, places):
    plan = Plan.load(ROOT / "benchmarks" / "plans" / name)
    parser = cli.build_parser()
    jobs = [*preparations(plan, places), *runs(plan, places)]
    assert len({job.name for job in jobs}) == len(jobs) == count
    for words in (step.words for job in jobs for step in job.steps):
        parser.parse_args(words)
        assert not any("{data}" in word for word in words)


def test_the_curve_over_level_sizes_differs_from_the_main_table_in_its_index_alone():
    main, curves = (Plan.load(ROOT / "benchmarks" / "plans" / name) for name in ("quality.toml", "quality-curves.toml"))
    assert (curves.train, curves.evaluate) == (main.train, main.evaluate)
    assert not {"nezha"} & {*curves.by_method, *main.by_method}
    assert curves.models.items() <= main.models.items()
    for dataset in curves.datasets.values():
        assert dataset["prepare"] == main.datasets["beauty-file-order"]["prepare"]
        assert dataset["tokenize"][2:] == main.datasets["beauty-file-order"]["tokenize"][2:]


def test_runs_come_in_the_plans_order(places, tmp_path):
    order = 'order = [{ methods = ["ar"], seeds = [1] }, { methods = ["ar"] }]\n[models.tiny]'
    plan = plan_of(tmp_path, PLAN.replace("[models.tiny]", order))
    assert [job.name.split("/")[2:4] for job in runs(plan, places)] == [["ar", "1"], ["ar", "0"]]
    first = load(f"{tmp_path / 'plan.toml'}:1")
    assert [job.name.split("/")[2:4] for job in runs(first, places)] == [["ar", "1"]]


def test_a_model_waits_for_its_teacher_and_is_another_with_another(places, tmp_path):
    taught = '[models.taught]\ntrain = ["--teacher", "sasrec", "{model:tiny}"]\n[datasets.ring]'

    def jobs(text=PLAN):
        plan = plan_of(tmp_path, text.replace("[datasets.ring]", taught).replace("alone = 3\n", ""))
        named = [job for job in runs(plan, places) if ":" not in job.name]
        return {(*job.name.split("/")[1:3], int(job.name.split("/")[3])): job for job in named}

    found = jobs()
    assert len(found) == 8
    for method, seed in itertools.product(("nezha", "ar"), (0, 1)):
        teacher, student = found["tiny", method, seed], found["taught", method, seed]
        assert (teacher.after, student.after) == (("ring: data",), ("ring: data", teacher.name))
        assert student.steps[0] == teacher.steps[0]
        words = student.steps[1].words
        assert words[words.index("--teacher") + 1 :][:2] == ["sasrec", str(teacher.steps[0].made.parent)]
        assert words[-2:] == ["--teacher-cache", str(places.work / "teachers")]
    other = jobs(PLAN.replace('"--layers", "1"', '"--layers", "2"'))
    assert {job.name for job in found.values()}.isdisjoint(job.name for job in other.values())


def test_whatever_runs_alone_waits_for_all_plans(places, tmp_path, capsys):
    plan_of(tmp_path, PLAN.replace("[models.tiny]", "order = [{ seeds = [0] }, {}]\n[models.tiny]"))
    plans = [f"{tmp_path / 'plan.toml'}:1", str(tmp_path / "plan.toml")]
    assert main([*plans, "--data", str(places.data), "--work", str(places.work), "--list"]) == 0
    listed = [line.split(": ")[1] if line.count(": ") > 1 else "" for line in capsys.readouterr().out.splitlines()]
    assert listed == ["", "baselines", "", "widths", "", "", "alone"]


def test_plans_of_one_command_may_have_several_indexes_of_a_data_set(places, tmp_path):
    texts = (PLAN, PLAN.replace('"--codes", "6"', '"--codes", "7"'), PLAN)
    [data] = joined(job for text in texts for job in preparations(plan_of(tmp_path, text), places))
    assert [step.words[0] for step in data.steps] == ["prepare", "tokenize", "tokenize"]
    assert len({step.made for step in data.steps}) == 3


def test_jobs_are_spread_over_the_gpus(places, tmp_path):
    script = "echo $CUDA_VISIBLE_DEVICES > {made}; sleep 0.5"
    jobs = [job_of(places, f"job {n}", script, tmp_path / f"made{n}") for n in range(4)]
    shared = runner(places, processes=4)
    shared.gpus = ["0", "1"]
    assert shared.run(jobs)
    assert sorted((tmp_path / f"made{n}").read_text() for n in range(4)) == ["0\n", "0\n", "1\n", "1\n"]


def test_baselines_are_measured_once_a_data_set_and_sasrec_once_a_seed(places):
    plan = Plan.load(ROOT / "benchmarks" / "plans" / "quality.toml")
    asked = [
        (job.name.split("/")[0], job.name.split("/")[3], tuple(step.words[step.words.index("--baselines") + 1 :]))
        for job in runs(plan, places)
        for step in job.steps
        if "--baselines" in step.words and step.words[-1] != "--baselines"
    ]
    everything, again = ("popularity", "markov", "knn", "sasrec"), ("sasrec",)
    expected = [
        (name, str(seed), again if seed else everything)
        for name in plan.datasets
        for seed in ((0,) if name == "beauty-letter" else (0, 1, 2))
    ]
    assert sorted(asked) == sorted(expected)


def test_threads_are_shared_out_unless_the_environment_says_otherwise(places, tmp_path, monkeypatch):
    def threads(processes):
        made = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
        job = job_of(places, made.name, "echo $OMP_NUM_THREADS > {made}", made)
        assert runner(places, processes=processes).run([job])
        return int(made.read_text())

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(1) == len(os.sched_getaffinity(0))
    assert threads(1000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(1) == 3


def test_baselines_and_widths_come_after_their_model(places):
    plan = Plan.load(ROOT / "benchmarks" / "plans" / "quality.toml")
    jobs = {job.name: job for job in runs(plan, places)}
    last = ["", "widths", "alone"]
    for name, job in jobs.items():
        model, _, what = name.partition(": ")
        last = last[last.index(what if what != "baselines" else "") :]  # none before all models, none left for later
        assert job.alone == (what == "alone")
        if what:
            assert job.after == ((f"{model}: baselines" if what == "widths" else model),)
            assert job.steps[0] == jobs[model].steps[0]


def test_ranks_come_back(tmp_path):
    from nezha_vllm.training.comparison import Comparison
    from nezha_vllm.training.metrics import UNRANKED
    from nezha_vllm.training.results import load_ranks, save_ranks

    ranks = {"NEZHA: b": np.array([0, UNRANKED, 499]), "language model, beam search": np.array([7])}
    save_ranks(tmp_path / "deep" / "r.npz", Comparison("d", "test", 3, 9, False, 5, 9, "v", {}, ranks=ranks))
    found = load_ranks(tmp_path / "deep" / "r.npz")
    assert {name: values.tolist() for name, values in found.items()} == {n: v.tolist() for n, v in ranks.items()}


def test_gains_are_over_the_base_of_the_same_sequences(tmp_path, capsys):
    plan = ROOT / "benchmarks" / "plans" / "quality-search.toml"
    figures = {
        "beauty-file-order/base": 0.04,
        "beauty-file-order/head-dropout-0.3": 0.05,
        "beauty-letter/base": 0.042,
        "scientific/base": 0.06,
        "scientific/head-dropout-0.3": 0.063,
    }
    names = [job.name for job in runs(Plan.load(plan), Places(Path(), Path(), Path()))]
    lines = ["run,dataset,data_hash,split,method,config,seed,validity,ndcg@10"]
    config = '"{""family"": ""llama"", ""epochs"": 30, ""layers"": 2, ""hidden"": 256}"'
    lines.append(f"beauty-file-order/base/nezha/0/older,beauty-file-order,beauty,valid,NEZHA,{config},0,stepwise,0.9")
    for start, value in figures.items():
        run = next(name for name in names if name.startswith(f"{start}/nezha/0"))
        dataset = start.split("/")[0]
        lines.append(f"{run},{dataset},{dataset[:6]},valid,NEZHA,{config},0,stepwise,{value}")
    (tmp_path / "results.csv").write_text("\n".join(lines))
    assert quality_gains.main([str(plan), "--results", str(tmp_path / "results.csv")]) == 0
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert ["head-dropout-0.3", "NEZHA", "+25.0", "+5.0", "+15.0"] in found
    assert ["beauty-letter, base", "NEZHA", "+5.0", "", "+5.0"] in found
    assert len(found) == 4
