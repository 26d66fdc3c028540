"""Plans of benchmarks: the one in the repository can be run, a wrong one says where it is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.machine import ROOT
from benchmarks.run import CommandStep, Plan, ServerStep, cells, main
from benchmarks.workload import Cell

SERVER = '[models]\ntiny.init = []\n[[steps]]\nname = "s"\nsystems = ["nezha"]\nmodel = "tiny"\n'


@pytest.mark.parametrize("name", ["h100", "two-gpus"])
def test_a_plan_of_the_repository_names_models_and_flags_that_exist(name):
    from nezha_vllm.hf.backbones import BACKBONES

    plan = Plan.load(ROOT / "benchmarks" / "plans" / f"{name}.toml")
    assert all(arguments[1] in BACKBONES for arguments in plan.models.values())
    asked = {system for step in plan.steps if isinstance(step, ServerStep) for system in step.systems}
    assert asked == ({"nezha", "vllm-beam", "vllm-one-token"} if name == "h100" else {"nezha"})
    for step in plan.steps:
        if isinstance(step, CommandStep):
            assert (ROOT / Path(*step.command[0].split("."))).with_suffix(".py").is_file()


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
        ('[[steps]]\nname = "s"\n', "systems"),
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


def test_a_step_that_is_not_planned_is_refused(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(SERVER)
    argv = [sys.executable, "-m", "benchmarks.run", str(path), "--folder", str(tmp_path), "--only", "t"]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no steps ['t']; the plan has ['s']" in run.stderr
