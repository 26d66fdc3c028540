"""`nezha status`: what a server's metrics say, for people and as JSON, and what is no server of ours."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.cli.status import facts
from nezha_vllm.scrape import Scrape, base_url

MODELS = json.dumps({"data": [{"id": "films"}]})
KEY = "a key"


@contextmanager
def answering(pages: dict[str, Any]) -> Iterator[str]:
    """URL of a server with these pages; one that is a number is that status, one that is a list is gone through."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path, 404)
            page = page.pop(0) if isinstance(page, list) else page
            if self.path == "/v1/models" and "key" in pages and self.headers["Authorization"] != f"Bearer {KEY}":
                page = 401
            self.send_response(page if isinstance(page, int) else 200)
            self.end_headers()
            self.wfile.write(b"" if isinstance(page, int) else page.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> CollectorRegistry:
    """A server's metrics after a short answer and a refusal."""
    from nezha_vllm.frontend.metrics import Metrics
    from nezha_vllm.payload import RankedIds

    registry, folder = CollectorRegistry(), tmp_path_factory.mktemp("status") / "catalogue"
    metrics = Metrics(registry)
    catalogue = Catalogue.build(["a", "b", "c"], [[0, 0], [0, 0], [1, 0]], [2, 1], version="[bold]monday")
    catalogue.save(folder)
    settings: Any = SimpleNamespace(catalogue=folder)
    metrics.show_catalogue(SimpleNamespace(catalogue=catalogue, settings=settings))  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(beam_width=64, rules=SimpleNamespace(sizes={}, unknown=0))
    ids = RankedIds(np.arange(3), np.zeros((3, 2)), num_drafted=8, num_valid=2, draft_seconds=0.004)
    metrics.record(plan, ids, SimpleNamespace(item_ids=["a", "c"], shortage="rules"))  # type: ignore[arg-type]
    metrics.count("answered", 0.012)
    metrics.count("refused", 5.0)
    return registry


@pytest.fixture
def page(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_people_read_a_table(page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with answering({"/metrics": page, "/v1/models": MODELS}) as url:
        assert cli.main(["status", url]) == 0
    shown = capsys.readouterr().out
    for text in (
        f"{url} serves films",
        "[bold]monday · published 0 s ago",
        "3 · 2 semantic IDs",
        "1 answered · 1 refused",
        "1 by rules",
        "25.0%",
        "mean 4 ms",
    ):
        assert text in shown


def test_programs_read_json(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering({"/metrics": page, "/v1/models": MODELS, "key": True}) as url:
        assert cli.main(["status", f"{url}/v1/", "--json", "--api-key", KEY]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["films"]
    assert found["catalogue"]["versions"] == {"[bold]monday": 1}
    assert 0 <= found["catalogue"].pop("age_seconds") < 600
    assert found["requests"] == {
        "answered": 1,
        "refused": 1,
        "overloaded": 0,
        "failed": 0,
        "disconnected": 0,
        "per_second": None,
        "running": None,
        "waiting": None,
    }
    assert found["answers"]["valid_beams"] == 0.25
    assert found["answers"]["items_each"] == 2
    assert found["seconds"]["draft_stage"]["mean"] == pytest.approx(0.004)
    assert found["seconds"]["request"] == pytest.approx({"mean": 0.012, "p50": 0.0125, "p99": 0.01495})
    assert found["seconds"]["queue"] == {"mean": None}


def test_over_some_seconds_only_what_happened_meanwhile_counts(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    later = page.replace('outcome="answered"} 1.0', 'outcome="answered"} 31.0')
    with answering({"/metrics": [page, later], "/v1/models": MODELS}) as url:
        assert cli.main(["status", url, "--over", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"]["answered"], found["requests"]["refused"]) == (30, 0)
    assert found["requests"]["per_second"] == pytest.approx(300)
    assert found["answers"]["items_each"] is None
    assert found["catalogue"]["items"] == 3


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({"/metrics": "<html>", "/v1/models": MODELS}, "not in Prometheus's format"),
        ({"/metrics": "up 1\n", "/v1/models": MODELS}, "started with --disable-log-stats"),
        ({"/v1/models": MODELS}, "/metrics answers 404; is it a vLLM server?"),
        ({"/metrics": 500}, "/metrics answers 500; see its log"),
        ({"/metrics": "nezha_beams_valid_total 1\n", "/v1/models": "{}"}, "no list of models"),
        ({"/metrics": "nezha_beams_valid_total 1\n", "/v1/models": MODELS, "key": True}, "--api-key"),
    ],
)
def test_what_is_no_server_of_ours_is_told(
    pages: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(pages) as url:
        assert cli.main(["status", url]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nezha status: ")


def test_no_server_and_one_that_hangs_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        assert cli.main(["status", url, "--timeout", "0.2"]) == 2
        assert "did not answer within 0.2 s" in capsys.readouterr().err
    assert cli.main(["status", url]) == 2
    assert f"no server at http://{url}/metrics: Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["ftp://host"], ["http://"], ["http://[::1"], ["", "--over", "0"], ["", "--timeout", "nan"]]
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", *arguments]) == 2
    assert "nezha status: " in capsys.readouterr().err


@pytest.mark.parametrize("given", ["host:1", "http://host:1", "http://host:1/", "http://host:1/v1", "host:1/metrics"])
def test_an_address_may_be_written_in_several_ways(given: str) -> None:
    assert base_url(given) == "http://host:1"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_value(values: list[float], share: float) -> None:
    bounds = [0.5, 1.0, 5.0, 20.0, 50.0]
    registry = CollectorRegistry()
    histogram = Histogram("h", "of values", buckets=bounds, registry=registry)
    for value in values:
        histogram.observe(value)
    found = Scrape.parse(generate_latest(registry).decode()).quantile("h", share)
    assert found is not None
    exact = sorted(values)[max(0, int(np.ceil(share * len(values) - 1e-9)) - 1)]
    low = max([0.0, *(bound for bound in bounds if bound < exact)])
    high = min([bound for bound in bounds if bound >= exact], default=bounds[-1])
    assert low - 1e-9 <= found <= high + 1e-9


def test_counters_of_a_server_that_was_restarted_begin_anew() -> None:
    before, behind = (Scrape({("answers_total", frozenset()): count}) for count in (1000.0, 7.0))
    assert behind.since(before).total("answers_total") == 7.0
    assert before.since(behind).total("answers_total") == 993.0


def test_nothing_counted_is_not_zero() -> None:
    nothing = facts(Scrape({}), Scrape({}), 0.0, None)
    assert nothing["answers"]["valid_beams"] is nothing["catalogue"]["age_seconds"] is None


@pytest.mark.slow
def test_a_running_server_is_described(server: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", server, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    catalogue = Catalogue.load(checkpoint / "catalogue")
    assert found["models"] == [str(checkpoint)]
    assert found["catalogue"]["versions"] == {catalogue.version: 1}
    assert found["catalogue"]["items"] == catalogue.num_items
    assert found["requests"]["running"] == 0
