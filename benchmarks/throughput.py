"""Throughput: requests/s and their latency as load grows, over HTTP; prompts handed over all at once, offline.

python -m benchmarks.throughput --model nezha-llama1b --beams 50:10 512:10 --clients 1 4 16 64 --rates auto
python -m benchmarks.throughput --model nezha-llama1b --over offline --beams 50:10 --batches 1 64 512
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from benchmarks import wrk
from benchmarks.engines import System, open_system
from benchmarks.latency import engine_tokens
from benchmarks.measure import Recorder, print_rows, repeat, run
from benchmarks.options import make_parser, parse, run_apart
from benchmarks.rows import Row, latencies
from benchmarks.served import Probe, Target, each_cell, probe
from benchmarks.vllm_bench import VllmBench
from benchmarks.workload import Cell, Workload, grid

AUTO_RATES = (0.5, 0.7, 0.8, 0.9)
OPEN_SECONDS = 10.0  # of an open loop at least: its users all connect in the first second, which p99 must not see


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    http = parser.add_argument_group("over HTTP")
    http.add_argument("--clients", nargs="*", type=int, default=[1, 4, 16, 32, 64], help="closed loop: how many")
    http.add_argument(
        "--rates",
        nargs="*",
        default=[],
        metavar="REQ/S",
        help=f"open loop: arrivals a second, 80%% of the closed loop's best, or auto: {AUTO_RATES} of it",
    )
    http.add_argument("--p99", type=float, default=30.0, metavar="MS", help="bound of the summary (default 30)")
    http.add_argument("--processes", type=int, default=4, help="of vllm bench serve, without wrk (default %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=[256], help="offline: prompts in one call")
    arguments = parse(parser, argv)
    if len(arguments.systems) > 1 and arguments.over != "http":
        return run_apart("benchmarks.throughput", arguments)
    run("throughput", arguments, over_http, offline, best_of)
    return 0


def best_of(recorder: Recorder) -> None:
    arguments = recorder.arguments
    if arguments.over == "http":
        print_rows(within(recorder.rows, arguments.p99), f"most requests/s with p99 ≤ {arguments.p99:g} ms")


def over_http(recorder: Recorder, arguments: argparse.Namespace, workload: Workload) -> None:
    needed = 0 if wrk.installed() else arguments.processes
    with VllmBench(needed) as bench:
        each_cell(arguments, workload, lambda target, cell: sweep(recorder, target, cell, arguments, bench))


def sweep(recorder: Recorder, target: Target, cell: Cell, arguments: argparse.Namespace, bench: VllmBench) -> None:
    """All numbers of clients, then all rates, of one cell; a load that cannot be measured leaves a row with a note."""
    seed, seconds = arguments.seed, arguments.seconds
    same = {"prefix_caching": arguments.prefix_caching}
    try:
        probe(target, cell, seed + 1)
        alone = probe(target, cell, seed + 2)
    except RuntimeError as error:
        recorder.add(target.system, cell, **same, note=str(error)[:300])
        return
    best = 0.0
    for number, clients in enumerate(arguments.clients):
        columns = same | {"load": "closed", "concurrency": clients, "engine_tokens": alone.engine_tokens}
        try:
            found = closed_loop(bench, target, cell, clients, alone, seconds, 10 * (seed + number) + 3)
            best = max(best, found["requests_per_s"])
        except RuntimeError as error:
            found = {"note": str(error)[:300]}
        recorder.add(target.system, cell, **columns, **found)
    for number, rate in enumerate(rates(arguments.rates, best)):
        columns = same | {"load": "open", "request_rate": rate, "engine_tokens": alone.engine_tokens}
        try:
            generator = wrk if wrk.installed() else bench
            found = generator.open_loop(target, cell, rate, max(seconds, OPEN_SECONDS), 10 * (seed + number) + 5)
        except RuntimeError as error:
            found = {"note": str(error)[:300]}
        recorder.add(target.system, cell, **columns, **found)


def closed_loop(
    bench: VllmBench, target: Target, cell: Cell, clients: int, alone: Probe, seconds: float, seed: int
) -> dict[str, Any]:
    if not wrk.installed():
        return bench.closed_loop(target, cell, clients, alone.milliseconds, seconds, seed)
    return wrk.closed_loop(target, cell, clients, seconds, seed)


def rates(asked: Sequence[str], best: float) -> Iterator[float]:
    for text in asked:
        if text == "auto":
            yield from (round(share * best, 1) for share in AUTO_RATES if best)
        elif text.endswith("%"):
            if best:
                yield round(float(text[:-1]) / 100 * best, 1)
        else:
            yield float(text)


def within(rows: Sequence[Row], p99_ms: float) -> list[Row]:
    """Of each system, cell and kind of load the row with the most requests/s whose p99 keeps the bound."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.system, row.prompt_tokens, row.beam_width, row.n, row.load)
        kept = row.p99_ms is not None and row.p99_ms <= p99_ms and not row.errors
        if kept and (key not in best or (row.requests_per_s or 0) > (best[key].requests_per_s or 0)):
            best[key] = row
    return list(best.values())


def offline(recorder: Recorder, arguments: argparse.Namespace, workload: Workload) -> None:
    [name] = arguments.systems
    system = open_system(name, arguments.model, arguments.vllm_args, arguments.over == "in-process")
    try:
        for cell in grid(name, arguments.prompts, arguments.beams):
            prompts = workload.token_ids(cell.prompt_tokens, arguments.seed)
            for batch in arguments.batches:
                measure_batch(recorder, name, system, cell, batch, prompts, arguments)
    finally:
        system.close()


def measure_batch(
    recorder: Recorder,
    name: str,
    system: System,
    cell: Cell,
    batch: int,
    prompts: Iterator[list[int]],
    arguments: argparse.Namespace,
) -> None:
    """``batch`` new prompts in one call, again and again; the latencies are those of the whole call."""
    columns: dict[str, Any] = {"load": "batch", "concurrency": batch, "generator": "one call after the other"}
    columns |= {"prefix_caching": system.prefix_caching}
    columns |= {"engine_tokens": engine_tokens(name, cell, recorder.workload)}
    try:
        repeat(lambda: system.answer(list(islice(prompts, batch)), cell), 2, arguments.seconds)
        found = repeat(lambda: system.answer(list(islice(prompts, batch)), cell), 1000, arguments.seconds)
    except Exception as error:  # out of memory, or a width that a peer refuses, is a finding
        recorder.add(name, cell, **columns, note=f"{type(error).__name__}: {str(error)[:200]}")
        return
    requests, seconds = batch * len(found), sum(found) / 1000
    columns |= {"requests": requests, "errors": 0, "seconds": seconds, "requests_per_s": requests / seconds}
    recorder.add(name, cell, **columns, **latencies(found))


if __name__ == "__main__":
    sys.exit(main())
