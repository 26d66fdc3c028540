"""`nezha plan`: the queues are right, the fit finds the server it was made from, and nothing unmeasured is assumed."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nezha_vllm import cli
from nezha_vllm.planning import calibration, fleet, measurements
from nezha_vllm.planning.calibration import percentiles
from nezha_vllm.planning.fleet import Wanted, capacity, make_plan
from nezha_vllm.planning.measurements import PlanError, read_curves
from nezha_vllm.planning.simulation import ServerModel, closed_loop, open_loop

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SERVER = ServerModel(
    step_ms=2.0, request_ms=0.5, api_ms=1.0, rest_ms=0.3, pause_ms=0.0, max_requests=31, api_processes=4
)
USERS = 512
WANTED = Wanted((5000.0,), {128: 1.0}, beam_width=512, n=10, items=50_000, p99_ms=30.0)


def test_a_request_alone_waits_for_nobody() -> None:
    engine, api = 2.0 + 0.5 + 0.3, 1.0
    for found, more in (
        (closed_loop(SERVER, 1, 2000), 0),
        (open_loop(SERVER, 1.0, 2000), 0),
        (open_loop(SERVER, 1.0, 2000, more_ms=np.array([4.0])), 4),
    ):
        assert found.mean() == pytest.approx(engine + api + more, rel=0.03)
        assert engine + more < found.min() < engine + more + api / 10


def test_users_with_long_pauses_are_poisson_arrivals_and_a_full_server_holds_them_up() -> None:
    users, rate = 512, 600.0
    found, poisson = closed_loop(SERVER, users, 12_000, pause_ms=1000 * users / rate), open_loop(SERVER, rate, 12_000)
    assert percentiles(found) == pytest.approx(percentiles(poisson), rel=0.1)
    pause_ms, most = 1000 * users / 4000, SERVER.most_requests_per_s()  # who waits does not pause
    full = closed_loop(SERVER, users, 12_000, pause_ms=pause_ms)[4000:]
    assert full.mean() == pytest.approx(1000 * users / most - pause_ms, rel=0.05)


def test_an_api_process_pauses_about_once_a_second() -> None:
    paused = replace(SERVER, pause_ms=30.0)
    slow = open_loop(paused, 100.0, 20_000, seed=1) > 15
    assert slow.mean() == pytest.approx(0.03 * 0.6, rel=0.4)  # whoever meets the part of a pause that is that long


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_without_batches_it_is_the_queue_of_the_textbook(load: float) -> None:
    """M/D/1: the mean wait is ρ s / 2 (1 - ρ)."""
    server = ServerModel(0.0, 10.0, 0.0, 0.0, 0.0, max_requests=1, api_processes=1)
    waits = open_loop(server, 100 * load, 40_000, seed=3) - 10
    assert waits.mean() == pytest.approx(10 * load / (2 * (1 - load)), rel=0.05)


def test_a_full_server_answers_as_many_as_its_steps_hold() -> None:
    answered = open_loop(SERVER, 2 * SERVER.most_requests_per_s(), 4000)
    assert answered.max() > 800, "twice what it can do must pile up"
    closed = closed_loop(SERVER, 31, 620)
    assert 31 * 0.5 + 2 < np.median(closed) < 31 * 0.5 + 2 + 31 * 1.0 / 4 + 2 * 2.5


def test_clients_over_a_step_wait_for_a_third_one_unless_steps_overlap() -> None:
    """Of 64 clients and steps of 31 two are left over; where a step is scheduled ahead, they have one of their own."""
    for overlapping, low, high in ((False, 1.3, 1.5), (True, 1.0, 1.15)):
        p50, p99 = percentiles(closed_loop(replace(SERVER, api_ms=0.5, overlapping=overlapping), 64, 4000))
        assert low < p99 / p50 < high


def test_rows_say_whether_steps_overlapped(tmp_path: Path) -> None:
    write_results(tmp_path, SERVER)
    [curve] = read_curves(tmp_path)
    assert not curve.overlapping
    for settings, commit, overlapping in (
        ("", "3fe91bed", False),
        ("--async-scheduling", "3fe91bed", True),
        ("", "later", True),
    ):
        assert replace(curve, settings=settings, commit=commit).overlapping == overlapping


def write_results(folder: Path, server: ServerModel) -> None:
    """Rows as if ``server`` had been measured, by so many users in open loops."""
    with (RESULTS / "throughput.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        row = next(row for row in rows if row["beam_width"] == "512")
        names = list(row)
    settings = "--api-server-count 4 --max-num-batched-tokens 4096 --no-async-scheduling"
    row |= {"settings": settings, "note": "", "commit": "made-up"}
    found = []
    for clients in (8, 16, 31):
        p50, p99 = percentiles(closed_loop(server, clients, 20 * clients, seed=9))
        found.append(row | {"load": "closed", "concurrency": clients, "request_rate": "", "p50_ms": p50, "p99_ms": p99,
                            "requests_per_s": 1000 * clients / p50})  # fmt: skip
    for rate in (400.0, 700.0, 1000.0):
        pause_ms = 1000 * USERS / rate
        latencies = closed_loop(server, USERS, 3000, seed=9, pause_ms=pause_ms)
        answered = 1000 * USERS / (pause_ms + latencies.mean())
        found.append(row | {"load": "open", "concurrency": "", "request_rate": rate, "requests": 800,
                            "p50_ms": np.median(latencies), "p99_ms": np.percentile(latencies, 99),
                            "requests_per_s": answered, "generator": f"wrk 4.1.0, {USERS} users"})  # fmt: skip
    with (folder / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(found)


def test_a_large_catalogue_is_measured_at_the_width_or_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((fleet, "SIMULATED"), (calibration, "FITTED"), (calibration, "TRIALS"), (calibration, "RUNS")):
        monkeypatch.setattr(module, name, {"SIMULATED": 2000, "FITTED": 1000}.get(name, 2))
    for name in ("throughput.csv", "latency.csv", "validity.csv"):
        lines = (RESULTS / name).read_text().splitlines()
        kept = [line for line in lines if name != "validity.csv" or ",100000000,512," not in line]
        (tmp_path / name).write_text("\n".join(kept) + "\n")
    make_plan(RESULTS, replace(WANTED, items=100_000_000))
    with pytest.raises(PlanError, match=r"beam width 512.*--estimate"):
        make_plan(tmp_path, replace(WANTED, items=100_000_000))


def test_the_plan_is_that_of_the_server_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "SIMULATED", 4000)
    monkeypatch.setattr(calibration, "TRIALS", 12)
    monkeypatch.setattr(calibration, "FITTED", 2000)
    write_results(tmp_path, SERVER)
    plan = make_plan(tmp_path, replace(WANTED, rates=(1000.0, 5000.0), p99_ms=16.0, spare=0.3))
    truth, *_ = capacity(SERVER, plan.curve, 16.0 / plan.margin)
    assert plan.per_replica == pytest.approx(truth, rel=0.1)
    assert plan.p99_ms <= 16.0 / plan.margin
    for count, rate in zip(plan.replicas, (1000, 5000), strict=True):
        assert (count - 1) * plan.per_replica < rate <= count * plan.per_replica
    assert plan.gpus == max(plan.replicas) + plan.spare
    assert plan.spare >= 0.3 * max(plan.replicas)
    assert plan.gpu_hours_followed == 12 * sum(plan.replicas) + 24 * plan.spare


@pytest.mark.parametrize("how", [["--markdown"], []], ids=["markdown", "terminal"])
def test_the_check_sets_every_load_beside_the_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    write_results(tmp_path, SERVER)
    for name, value in {"TRIALS": 3, "NEAR_TRIALS": 1, "RUNS": 2, "FITTED": 300}.items():
        monkeypatch.setattr(calibration, name, value)
    assert cli.main(["plan", "--check", "--results", str(tmp_path), *how]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if re.match(r"\W+\S+ clients|\W+[\d,]+/s", line)]
    assert len(lines) == 6
    for line in lines:
        assert len(re.findall(r"[+-]\d+ \([+-]\d+…[+-]\d+\)", line)) == 2, line
    assert "a step" in printed


def test_rows_of_another_commit_are_another_curve_and_the_newest_counts(tmp_path: Path) -> None:
    write_results(tmp_path, SERVER)
    with (tmp_path / "throughput.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        # a repetition; arrivals that thinned out; more users than one can count; another kind of load
        later = [row | {"commit": "later", "date": "2027-01-01T00:00:00+00:00"} for row in [*rows, rows[-1]]]
        later[-1] |= {"generator": "wrk 4.1.0, 2,048 users", "note": "fell behind the arrivals: 5 of 9 req/s"}
        writer.writerows([*later, later[0] | {"load": "batch", "concurrency": "64"}])
    newest, older = curves = read_curves(tmp_path)
    assert measurements.newest(curves) == [newest]
    assert measurements.newest([replace(newest, loads=tuple(newest.closed)), older]) == [older]
    assert (newest.commit, older.commit) == ("later", "made-up")
    assert [len(curve.closed) for curve in (newest, older)] == [3, 3]
    assert [len(curve.open) for curve in (newest, older)] == [4, 3]
    found = newest.open[-1]
    assert (found.users, found.kept_up, found.arrivals_per_s) == (2048, True, found.requests_per_s)
    assert found.arrivals_per_s < found.rate == 1000 * 2048 / found.pause_ms
    assert fleet.choose([newest, older], "llama-1b", 512, 10).commit == "later"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"beam_width": 1024}, "no load curve of llama-1b with K ≥ 1024.*benchmarks.throughput"),
        ({"n": 50}, "n ≥ 50"),
        ({"model": "gpt-5"}, "gpt-5"),
        ({"prompt_tokens": {128: 0.5, 512: 0.5}}, "512 tokens: the load curve has 128.*--estimate"),
        ({"prompt_tokens": {4000: 1.0}, "estimate": True}, "4000 tokens: the longest measured"),
        ({"items": 10**9, "estimate": True}, "largest catalogue measured has 100,000,000"),
        ({"prompt_tokens": {128: 0.5}}, "sum to 1"),
        ({"prompt_tokens": {128: math.nan}}, "sum to 1"),
        ({"burst": math.inf}, "burst is inf"),
        ({"gpu_price": math.nan}, "gpu_price is nan"),
        ({"rates": (0.0,)}, "traffic"),
        ({"spare": 1.0}, "spare"),
    ],
    ids=str,
)
def test_what_was_not_measured_is_refused_with_the_way_to_measure_it(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(RESULTS, replace(WANTED, **wanted))  # type: ignore[arg-type]


def test_a_goal_under_an_idle_servers_latency_is_refused() -> None:
    curve = next(curve for curve in read_curves(RESULTS) if len(curve.open) > 2)
    with pytest.raises(PlanError, match=r"nearly idle is .* over the goal of 3"):
        capacity(SERVER, curve, 3.0)


def test_missing_rows_and_traffic_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--requests-per-s", "5", "--results", str(tmp_path)]) == 2
    assert "throughput.csv is missing; name the folder" in capsys.readouterr().err
    (tmp_path / "day.csv").write_text("hour,visits\n0,5\n")
    assert cli.main(["plan", "--traffic", str(tmp_path / "day.csv"), "--results", str(RESULTS)]) == 2
    assert "requests_per_s" in capsys.readouterr().err
    assert cli.main(["plan", "--requests-per-s", "5", "--prompt-tokens", "long"]) == 2
    assert "--prompt-tokens long" in capsys.readouterr().err
