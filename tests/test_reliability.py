"""What the scripts of docs/reliability.md take for a wrong answer."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.additional import nezha_options, with_nezha
from benchmarks.reliability import load, start
from benchmarks.reliability.processes import print_memory
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.versions import difference

EXPECTED = [("a", -1.0), ("b", -2.0), ("c", -3.0)]


@pytest.mark.parametrize(
    ("found", "sure", "wrong"),
    [
        ([("a", -1.0), ("b", -2.0)], None, None),
        ([("a", -1.1), ("b", -1.9)], None, None),
        ([("b", -2.0), ("c", -3.0)], None, "a with -1.0 is missing"),
        ([("b", -2.0), ("c", -3.0)], {"b"}, None),
        ([("b", -2.0), ("c", -3.0)], {"a", "b"}, "a with -1.0 is missing"),
        ([("x", -0.5), ("a", -1.0)], {"a"}, "rank 0: x, which is not among the 3 best"),
        ([("a", -1.0), ("x", -3.1)], {"a"}, None),
        ([("a", -1.5), ("b", -2.0)], {"a"}, "rank 0: a with -1.5 instead of -1.0"),
        ([("a", -1.0)], None, "1 items instead of 2"),
    ],
)
def test_an_answer_may_differ_by_rounding_alone(found, sure, wrong):
    assert difference(found, EXPECTED, 0.2, 2, sure) == wrong


@contextmanager
def answering() -> Iterator[str]:
    """A server whose beam of K finds the items 0 … K - 1, of which the first are the best."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = range(min(asked["n"], asked["vllm_xargs"]["beam_width"]))
            choices = [{"catalogue_version": "v", "text": str(item), "score": -1.0 * item} for item in found]
            content = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_with_a_margin_a_wider_beam_says_what_may_come_and_a_narrower_one_what_must():
    with answering() as url:
        asked = Questions.of_server(url, [["i"]], 2, depth=50, beam_width=8, margin=4, tolerance=0.1)
    assert [item for item, _ in asked.expected["v"][0]] == [str(item) for item in range(32)]
    assert asked.sure == {"v": [{"0", "1"}]}
    assert asked.beam_width == 8


def test_a_margin_needs_a_beam_width():
    with pytest.raises(ValueError, match="beam width"):
        Questions.of_server("http://127.0.0.1:1", [["i"]], 2, margin=4)


@pytest.mark.parametrize("margin", [1, 4])
def test_no_reference_is_asked_for_more_items_than_its_beam_finds(margin, monkeypatch):
    asked = []

    def rankings(checkpoint, catalogues, histories, n, width, dtype):
        asked.append((n, width))
        return {"v": [[("a", -1.0)] * n]}

    class Here:
        """A pool that runs what it gets at once."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function, *values):
            done = Future()
            done.set_result(function(*values))
            return done

    monkeypatch.setattr("benchmarks.reliability.questions.rankings", rankings)
    monkeypatch.setattr("benchmarks.reliability.questions.ProcessPoolExecutor", Here)
    Questions.of_model(Path("m"), [], [["i"]], 10, depth=50, beam_width=128, margin=margin)
    assert asked == {1: [(50, 128)], 4: [(32, 32), (50, 512)]}[margin]


@pytest.fixture
def gpu_looks(tmp_path, monkeypatch):
    """The words of each call of an `nvidia-smi` that knows one GPU."""
    program, calls = tmp_path / "nvidia-smi", tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "3, 70"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines() if calls.is_file() else []


def test_gpus_are_looked_at_between_loads_only_and_no_others_than_the_servers(gpu_looks, monkeypatch, capfd):
    quiet = SimpleNamespace(since=lambda _: SimpleNamespace(quantile=lambda *_: None))
    monkeypatch.setattr(load, "metrics_of", lambda *_, **__: quiet)
    monkeypatch.setattr(load, "SAMPLE_SECONDS", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with load.Watch("http://server", os.getpgid(0)) as watch:
        time.sleep(0.5)
        assert len(gpu_looks()) == 1
        watch.part()
        time.sleep(0.5)
        assert len(gpu_looks()) == 2
    assert len(gpu_looks()) == 3
    assert all("-i 3 " in call for call in gpu_looks())
    watch.report()
    found = capfd.readouterr().out
    assert "GPU 3: 70, 70, 70 MiB" in found
    assert "MiB at first" in found, "processes are sampled all the time"


def test_memory_of_what_is_in_a_few_samples_is_told_as_it_was(capfd):
    print_memory([{"a": 5 << 20, "b": 1 << 20}] + [{"a": 6 << 20}] * 10 + [{"a": 7 << 20, "b": 2 << 20}])
    assert capfd.readouterr().out.splitlines() == [
        "a: 5 MiB at first, 6 in the second fifth, 6 in the last, 7 at most",
        "b: 1, 2 MiB",
    ]


@pytest.fixture
def server_argv(tmp_path, monkeypatch):
    """Servers are ready at once, log one line, and are told these arguments."""
    given = tmp_path / "argv"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def command(checkpoint, arguments):
        given.write_text(json.dumps(arguments))
        return ["sh", "-c", "echo a line of the log; sleep 60"]

    monkeypatch.setattr("nezha_vllm.server.command", command)
    monkeypatch.setattr(start.MeasuredServer, "wait_until_ready", lambda self, timeout: time.sleep(0.2) or 0.2)
    return lambda: json.loads(given.read_text())


def test_a_servers_log_goes_if_nothing_was_wrong(server_argv, tmp_path, capfd):
    with start.started(tmp_path) as server:
        assert server.log.is_file()
    assert not server.log.parent.exists()
    assert "log" not in capfd.readouterr().out
    assert "--disable-uvicorn-access-log" in server_argv()


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_servers_log_stays_after_a_problem(server_argv, tmp_path, capfd, error):
    def use() -> None:
        with start.started(tmp_path) as server:
            logs.append(server.log)
            server.wrong = 2
            if error:
                server.wrong = 0
                raise error

    logs: list[Path] = []
    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert logs[0].read_text() == "a line of the log\n"
    assert f"the server's log: {logs[0]}\n" in capfd.readouterr().out


def test_a_log_with_a_place_stays_there(server_argv, tmp_path):
    with start.started(tmp_path, log=tmp_path / "kept.txt"):
        pass
    assert (tmp_path / "kept.txt").read_text() == "a line of the log\n"
    assert not list(tmp_path.glob("nezha-reliability-*"))


@pytest.mark.parametrize(
    "given",
    [
        ["--additional-config", '{"a": 1, "nezha": {"lean_step": false}}'],
        ['--additional_config={"a": 1, "nezha": {"lean_step": false}}'],
        ["--additional-config", '{"b": 2}', "--additional-config", '{"a": 1, "nezha": {"lean_step": false}}'],
    ],
)
def test_options_of_a_script_stand_beside_those_behind_the_dashes(given):
    flag, text, *others = with_nezha([*given, "--seed", "1"], catalogue="c")
    assert (flag, others) == ("--additional-config", ["--seed", "1"])
    assert json.loads(text) == {"a": 1, "nezha": {"lean_step": False, "catalogue": "c"}}
    assert nezha_options(given) == {"lean_step": False}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--additional-config", '{"nezha": {"catalogue": "mine"}}'], "catalogue is set by this script"),
        (["--additional-config.nezha.lean_step", "false"], "write it as one object"),
        (["--additional-config", "{"], "'{' is not JSON"),
        (["--additional-config"], "'' is not JSON"),
        (['--additional-config={"nezha": 3}'], "must be objects"),
    ],
)
def test_options_that_cannot_stand_beside_a_scripts_are_refused(given, words):
    with pytest.raises(SystemExit, match=words):
        with_nezha(given, catalogue="c")
