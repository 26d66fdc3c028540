"""Plans of benchmarks: the one in the repository can be run, a wrong one says where it is wrong."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.machine import ROOT
from benchmarks.run import CommandStep, Plan, ServerStep, cells, main
from benchmarks.workload import Cell
from nezha_vllm import cli

SERVER = '[models]\ntiny.init = []\n[[steps]]\nname = "s"\nsystems = ["nezha"]\nmodel = "tiny"\n'


@pytest.mark.parametrize("name", ["h100", "several-gpus"])
def test_a_plan_of_the_repository_names_models_and_flags_that_exist(name):
    from nezha_vllm.hf.backbones import BACKBONES

    plan = Plan.load(ROOT / "benchmarks" / "plans" / f"{name}.toml")
    assert all(arguments[1] in BACKBONES for arguments in plan.models.values())
    asked = {system for step in plan.steps if isinstance(step, ServerStep) for system in step.systems}
    assert asked == ({"nezha", "vllm-beam", "vllm-one-token"} if name == "h100" else {"nezha"})
    for step in plan.steps:
        if isinstance(step, CommandStep):
            assert (ROOT / Path(*step.command[0].split("."))).with_suffix(".py").is_file()


@pytest.mark.parametrize("name", ["h100", "several-gpus"])
def test_rows_of_servers_with_other_flags_have_other_names(name):
    steps = Plan.load(ROOT / "benchmarks" / "plans" / f"{name}.toml").steps
    labels = [step.label or step.model for step in steps if isinstance(step, ServerStep)]
    assert len(set(labels)) == len(labels)
    for step in steps:
        if isinstance(step, ServerStep) and step.systems == ["nezha"]:
            assert ("no async scheduling" in step.label) == ("--no-async-scheduling" in step.vllm), step.name
            assert step.label, step.name


def test_servers_that_start_together_fit_their_gpus():
    """Each at least its weights and cache; a GPU of 80 GB is not promised more."""
    from nezha_vllm.hf.backbones import BACKBONES

    plan = Plan.load(ROOT / "benchmarks" / "plans" / "several-gpus.toml")
    cache = int(plan.together[plan.together.index("--kv-cache-memory-bytes") + 1])
    for machine in ("01", "0123"):
        taken = dict.fromkeys(machine, 0.0)
        for step in plan.steps:
            gpus = step.gpus.split(",")
            if not set(gpus) <= set(machine):
                continue
            shape = BACKBONES[step.model]
            layer = 3 * shape["hidden_size"] * shape["intermediate_size"] + 3 * shape["hidden_size"] ** 2
            weights = 2 * (shape["num_hidden_layers"] * layer + shape["vocab_size"] * shape["hidden_size"])
            tensor_parallel = "--tensor-parallel-size" in step.vllm
            for gpu in gpus:
                taken[gpu] += cache + weights / (len(gpus) if tensor_parallel else 1)
        assert 1e9 < max(taken.values()) < 65e9, machine


def test_systems_are_asked_what_they_can_answer_once():
    assert cells(["128:10:5", "128:50:5"], "nezha") == [Cell(128, 10, 5), Cell(128, 50, 5)]
    assert cells(["128:10:5", "128:50:5"], "vllm-one-token") == [Cell(128, 1, 1)]
    assert cells(["128:10:5"], "vllm-beam") == [Cell(128, 10, 10)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SERVER.replace("tiny.init", "other.init"), "wants model 'tiny'"),
        (SERVER + 'speed = "high"\n', "unknown fields \\['speed'\\]"),
        (SERVER.replace('["nezha"]', '["nezha", "vllm-beam"]'), "a server, of its own"),
        (SERVER.replace('["nezha"]', '["hf-beam"]'), "not \\['hf-beam'\\]"),
        (SERVER + 'latency = ["128"]\n', "step s: '128': write prompt tokens:K:n"),
        (SERVER + 'vllm = ["--additional-config.nezha.catalogue", "c"]\n', "step s: .* write it as one object"),
        ('[[steps]]\nname = "s"\n', "systems"),
        (SERVER + SERVER.partition("[[steps]]")[1] + SERVER.partition("[[steps]]")[2], "two steps are called 's'"),
    ],
)
def test_a_wrong_plan_says_where(tmp_path, text, words):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Plan.load(path)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, capfd):
    path = tmp_path / "plan.toml"
    path.write_text(
        '[[steps]]\nname = "broken"\ncommand = ["benchmarks.tables", "--no-such-flag"]\n'
        '[[steps]]\nname = "whole"\ncommand = ["benchmarks.tables", "--show", "--results", "{results}"]\n'
        '[[steps]]\nname = "left out"\ncommand = ["benchmarks.tables", "--no-such-flag"]\n'
    )
    status = main([str(path), "--folder", str(tmp_path), "--results", str(tmp_path), "--only", "broken", "whole"])
    assert status == 1
    found = capfd.readouterr()
    assert "failed: broken\n" in found.err
    assert "whole: " in found.out


def test_servers_start_together_and_each_is_asked_in_its_turn(tmp_path, monkeypatch, capfd):
    """With servers that only say what became of them."""
    import benchmarks.run as run

    told, made = [], []

    @contextmanager
    def starting(system, checkpoint, vllm_args, gpus, cores):
        told.append(f"start {gpus} {cores} {vllm_args[-1]}")
        says = {"wait_until_ready": "ready", "pause": "hold", "resume": "go on"}
        yield SimpleNamespace(**{name: partial(told.append, f"{word} {gpus}") for name, word in says.items()})
        told.append(f"stop {gpus}")

    def ask(step, target, *_):
        told.append(f"ask {step.name}")
        if step.name == "b":
            raise RuntimeError("no answer")

    monkeypatch.setattr(run, "starting", starting)
    monkeypatch.setattr(run, "ready", lambda server, system, workload, gpus: run.Target(system, "", workload))
    monkeypatch.setattr(run, "ask", ask)
    here = SimpleNamespace(run=lambda argv, check: made.append(cli.main(argv[3:])), SubprocessError=ValueError)
    monkeypatch.setattr(run, "subprocess", here)  # what makes the checkpoint, in this process
    path = tmp_path / "plan.toml"
    init = ["--backbone", "tiny", "--random-weights", "--hidden", "64", "--heads", "2", "--random-items", "20"]
    steps = "".join(
        f'[[steps]]\nname = "{name}"\nsystems = ["nezha"]\nmodel = "tiny"\ngpus = "{gpu}"\ncores = "0-1"\n'
        for gpu, name in enumerate("abc")
    )
    path.write_text(f'together = ["--seed", "9"]\n[models]\ntiny.init = {json.dumps([*init, "--codes", "8"])}\n{steps}')
    where = [str(path), "--folder", str(tmp_path), "--results", str(tmp_path)]
    assert main([*where, "--together"]) == 1
    starts = [f"start {gpu} 0-1 9" for gpu in range(3)]
    assert told == [
        *starts,
        *(f"ready {gpu}" for gpu in range(3)),
        *(f"hold {gpu}" for gpu in range(3)),
        *("go on 0", "ask a", "stop 0"),
        *("go on 1", "ask b", "stop 1"),
        *("go on 2", "ask c", "stop 2"),
    ]
    assert "failed: b\n" in capfd.readouterr().err
    assert made == [0]
    told.clear()
    assert main([*where, "--only", "c"]) == 0
    assert told == ["start 2 0-1 bfloat16", "go on 2", "ask c", "stop 2"]


def test_a_step_that_is_not_planned_is_refused(tmp_path, capsys):
    path = tmp_path / "plan.toml"
    path.write_text(SERVER)
    with pytest.raises(SystemExit, match="2"):
        main([str(path), "--folder", str(tmp_path), "--only", "t"])
    assert "no steps ['t']; the plan has ['s']" in capsys.readouterr().err
