"""The ``nezha`` command: help that is quick, mistakes that are explained, steps that are kept, a server that ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from watching import assert_ends_with_parent, is_running

from nezha_vllm import cli, server
from nezha_vllm.cli import steps
from nezha_vllm.cli.serve import serving_defaults
from nezha_vllm.cli.titles import ranking
from nezha_vllm.client import Item, prompt

HELP_SECONDS = 3.0  # 0.3 s on an idle machine; importing torch alone takes longer than this limit on a busy one


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_explains_the_verb_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"nezha {verb} " in capsys.readouterr().out.split("options:")[0].split("\n\n", 1)[1]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom nezha_vllm.cli import build_parser\nbuild_parser().format_help()\n"
        "print([name for name in ('torch', 'transformers', 'sklearn', 'vllm', 'pyarrow') if name in sys.modules])"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
    assert time.monotonic() - start < HELP_SECONDS


def test_unknown_arguments_are_refused_unless_the_verb_passes_them_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", "movielens-100k", "--out", "x", "--dtype", "float32"])
    assert stop.value.code == 2
    assert "--dtype float32" in capsys.readouterr().err
    known, more = cli.build_parser().parse_known_args(["serve", "folder", "--port", "9", "--dtype", "float32"])
    assert (known.checkpoint, known.port, more) == ("folder", 9, ["--dtype", "float32"])


LOG, COUNT = "--disable-uvicorn-access-log", "--api-server-count"


@pytest.mark.parametrize(
    ("given", "cores", "gpu", "expected"),
    [
        ([], 16, True, [LOG, COUNT, "4"]),
        ([], 64, True, [LOG, COUNT, "4"]),
        ([], 8, True, [LOG, COUNT, "2"]),
        ([], 6, True, [LOG]),
        ([], 16, False, [LOG]),
        (["--data-parallel-size=2"], 16, True, [LOG]),
        (["-dp", "2"], 16, True, [LOG]),
        (["--config", "server.yaml"], 16, True, []),
    ],
    ids=str,
)
def test_serve_starts_api_processes_for_the_machine_and_no_access_log(
    given: list[str], cores: int, gpu: bool, expected: list[str]
) -> None:
    assert serving_defaults(given, cores, gpu) == expected


def test_arguments_of_the_user_win_over_those_of_serve() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    ours = serving_defaults([], 16, True)
    found = parser.parse_args(ours)
    assert (found.api_server_count, found.disable_uvicorn_access_log) == (4, True)
    for theirs in (["--api-server-count", "1"], ["--api_server_count=1"], ["-asc", "1"]):
        assert parser.parse_args([*ours, *theirs]).api_server_count == 1
    assert not parser.parse_args([*ours, "--no-disable-uvicorn-access-log"]).disable_uvicorn_access_log


def test_connections_outlive_a_pause_of_60_seconds_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert int(server.environment(tmp_path)["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7")
    assert server.environment(tmp_path)["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"


def test_serve_refuses_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "config.json is missing; make one with `nezha train`" in capsys.readouterr().err


def test_a_server_that_ends_by_itself_has_failed_also_with_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nezha_vllm.cli.checks.check_checkpoint", lambda folder: None)
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(server.Server, "wait_until_ready", lambda self: 0.0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["serve", str(tmp_path), "--port", str(server.free_port())]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ended by itself with status 0" in capsys.readouterr().out


def test_recommend_without_a_server_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.free_port()}"
    assert cli.main(["recommend", "--history", "1", "--url", url]) == 2
    assert f"no server at {url}; start one with `nezha serve CHECKPOINT`" in capsys.readouterr().err


def test_a_user_without_a_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "--user", "1"]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_prompt_keeps_the_order_of_the_history() -> None:
    assert prompt(["50", "b c", "7"]) == "<item:50><item:b c><item:7>"


def test_ranking_marks_the_held_out_film() -> None:
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(ranking([Item("1", -2.5, (3, 4)), Item("2", -3.0, (0, 1))], {"1": "One", "2": "Two"}, held_out="2"))
    rows = [line for line in console.export_text().splitlines() if "One" in line or "Two" in line]
    assert "watched next" not in rows[0]
    assert "watched next" in rows[1]
    assert "-2.50" in rows[0]


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record verbs instead of running them; each makes its output."""
    ran: list[list[str]] = []

    def main(argv: list[str]) -> int:
        ran.append(argv)
        Path(argv[argv.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(steps, "main", main)
    return ran


def prepare(folder: Path, *more: str) -> list[str]:
    return ["prepare", "movielens-100k", "--out", str(folder / "dataset"), *more]


def tokenize(folder: Path) -> list[str]:
    return ["tokenize", str(folder / "dataset"), "--out", str(folder / "catalogue")]


def run_steps(folder: Path, *argvs: list[str]) -> list[bool]:
    runner = steps.Steps(folder, Console(quiet=True))
    return [runner.run(argv, Path(argv[argv.index("--out") + 1])) for argv in argvs]


def test_finished_steps_are_kept(tmp_path: Path, verbs: list[list[str]]) -> None:
    assert run_steps(tmp_path, prepare(tmp_path), tokenize(tmp_path)) == [True, True]
    assert run_steps(tmp_path, prepare(tmp_path), tokenize(tmp_path)) == [False, False]
    assert len(verbs) == 2


def test_other_settings_run_a_step_and_all_behind_it_again(tmp_path: Path, verbs: list[list[str]]) -> None:
    run_steps(tmp_path, prepare(tmp_path), tokenize(tmp_path))
    assert run_steps(tmp_path, prepare(tmp_path, "--seed", "1"), tokenize(tmp_path)) == [True, True]


def test_a_missing_output_is_made_again(tmp_path: Path, verbs: list[list[str]]) -> None:
    run_steps(tmp_path, prepare(tmp_path), tokenize(tmp_path))
    (tmp_path / "catalogue").rmdir()
    assert run_steps(tmp_path, prepare(tmp_path), tokenize(tmp_path)) == [False, True]


def test_a_failed_step_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: list[list[str]]) -> None:
    run_steps(tmp_path, prepare(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(steps.StepFailed):
        patch.setattr(steps, "main", lambda argv: 2)
        run_steps(tmp_path, prepare(tmp_path, "--seed", "1"))
    assert run_steps(tmp_path, prepare(tmp_path, "--seed", "1")) == [True]


def test_a_stopped_step_stops_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "main", lambda argv: 130)
    with pytest.raises(KeyboardInterrupt):
        run_steps(tmp_path, prepare(tmp_path))


def test_an_item_that_the_catalogue_lacks_is_named_and_other_missing_keys_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nezha_vllm.cli import train
    from nezha_vllm.item_index import UnknownItemError

    error: KeyError = UnknownItemError("B00")

    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(train, "run", fail)
    words = ["train", "data", "catalogue", "--out", str(tmp_path / "model")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "item 'B00' is not in the catalogue; make data set and catalogue of the same items" in said
    error = KeyError("weight")
    with pytest.raises(KeyError, match="weight"):
        cli.main(words)


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> server.Server:
    """A server that ignores SIGTERM and has a child of its own, as vLLM's engine process is."""
    monkeypatch.setattr(server, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(server, "command", lambda checkpoint, arguments: [sys.executable, "-c", STUBBORN])
    return server.Server(tmp_path, server.free_port(), log=tmp_path / "server.log")


def pids_of(running: server.Server) -> list[int]:
    assert running.log is not None
    while not (text := running.log.read_text()).endswith("\n"):
        time.sleep(0.02)
    return [running.process.pid, int(text)]


def test_leaving_the_block_ends_the_server_and_its_children(stubborn_server: server.Server) -> None:
    with pytest.raises(KeyboardInterrupt), stubborn_server as running:
        pids = pids_of(running)
        assert all(map(is_running, pids))
        raise KeyboardInterrupt
    assert not any(map(is_running, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_held_server_rests_goes_on_and_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)\nwhile True: pass"
    monkeypatch.setattr(server, "command", lambda checkpoint, arguments: [sys.executable, "-c", busy])

    def states(pids: list[int], wanted: set[str]) -> set[str]:
        found, until = set(), time.monotonic() + 10
        while found != wanted and time.monotonic() < until:
            found = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}
        return found

    with server.Server(tmp_path, server.free_port(), log=tmp_path / "server.log") as running:
        pids, at_rest = pids_of(running), {"T"}
        running.pause()
        assert states(pids, at_rest) == at_rest
        running.resume()
        assert states(pids, {"R", "S"}) == {"R", "S"}
        running.pause()
        begun = time.monotonic()
    assert time.monotonic() - begun < server.STOP_SECONDS / 2  # by SIGTERM
    assert not any(map(is_running, pids))


KILLED = """
import os, signal, sys
from pathlib import Path
from nezha_vllm import server
server.command = lambda checkpoint, arguments: [sys.executable, "-c", "import time; time.sleep(600)"]
with server.Server(Path(), server.free_port(), log=Path(sys.argv[1])) as held:
    held.pause()
    while Path(f"/proc/{held.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        pass
    print(held.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_held_server_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "log")], stdout=subprocess.PIPE, check=False)
    pid, until = int(parent.stdout), time.monotonic() + 20
    try:
        while is_running(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_running(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_server_that_ends_by_itself_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-c", "print('no catalogue at x'); raise SystemExit(3)"]
    monkeypatch.setattr(server, "command", lambda checkpoint, arguments: program)
    failing = server.Server(tmp_path, server.free_port(), log=tmp_path / "server.log")
    with failing, pytest.raises(server.ServerError, match=r"status 3(.|\n)*no catalogue at x"):
        failing.wait_until_ready(timeout=20)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_server_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom nezha_vllm import server\n"
        "server.command = lambda checkpoint, arguments: [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"with server.Server({str(tmp_path)!r}, 1) as running:\n"
        "    print(running.process.pid, flush=True)\n    time.sleep(600)"
    )
    assert_ends_with_parent([sys.executable, "-c", code])
