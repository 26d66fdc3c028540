"""Latency of one request at a time: p50, p90 and p99 for each prompt size and beam width.

python -m benchmarks.latency --model nezha-llama1b --systems nezha vllm-beam vllm-one-token --beams 10:10 512:50
python -m benchmarks.latency --model nezha-llama1b --over in-process --systems nezha hf-nezha hf-beam
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from benchmarks import wrk
from benchmarks.engines import System, open_system
from benchmarks.measure import Recorder, one_by_one, run
from benchmarks.options import make_parser, parse, run_apart
from benchmarks.rows import latencies
from benchmarks.served import Target, each_cell, probe
from benchmarks.vllm_bench import VllmBench
from benchmarks.workload import Cell, Workload, grid

SLOW = "a single request: it takes over a third of the budget"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(make_parser(__doc__), argv)
    if len(arguments.systems) > 1 and arguments.over != "http":
        return run_apart("benchmarks.latency", arguments)
    run("latency", arguments, over_http, offline)
    return 0


def offline(recorder: Recorder, arguments: argparse.Namespace, workload: Workload) -> None:
    [name] = arguments.systems
    system = open_system(name, arguments.model, arguments.vllm_args, arguments.over == "in-process")
    try:
        for cell in grid(name, arguments.prompts, arguments.beams):
            measure_offline(recorder, name, system, cell, workload, arguments)
    finally:
        system.close()


def measure_offline(
    recorder: Recorder, name: str, system: System, cell: Cell, workload: Workload, arguments: argparse.Namespace
) -> None:
    prompts = workload.token_ids(cell.prompt_tokens, arguments.seed)
    columns = {"load": "one", "concurrency": 1, "generator": "one call after the other"}
    columns |= {"prefix_caching": system.prefix_caching, "engine_tokens": engine_tokens(name, cell, workload)}
    try:
        found = one_by_one(lambda prompt: system.answer([prompt], cell), prompts, arguments.seconds)
    except Exception as error:  # out of memory, or a width that a peer refuses, is a finding
        recorder.add(name, cell, **columns, note=f"{type(error).__name__}: {str(error)[:200]}")
        return
    columns |= {"requests": len(found), "errors": 0, "seconds": sum(found) / 1000}
    recorder.add(name, cell, **columns, requests_per_s=1000 * len(found) / sum(found), **latencies(found))


def engine_tokens(system: str, cell: Cell, workload: Workload) -> int:
    """Only NEZHA's prompts end with placeholders; its peers read the history alone and decode L tokens."""
    total = workload.engine_tokens(cell.prompt_tokens)
    return total if system.endswith("nezha") else total - workload.levels


def over_http(recorder: Recorder, arguments: argparse.Namespace, workload: Workload) -> None:
    # without wrk, the workers import vLLM while the first server starts
    with nullcontext() if wrk.installed() else VllmBench(1) as bench:
        each_cell(arguments, workload, lambda target, cell: measure_http(recorder, target, cell, arguments, bench))


def measure_http(
    recorder: Recorder, target: Target, cell: Cell, arguments: argparse.Namespace, bench: VllmBench | None
) -> None:
    seed, seconds = arguments.seed, arguments.seconds
    columns: dict[str, Any] = {"load": "closed", "concurrency": 1, "prefix_caching": arguments.prefix_caching}
    try:
        probe(target, cell, seed + 1)  # compiles what this cell is the first to need
        second = probe(target, cell, seed + 2)
        columns["engine_tokens"] = second.engine_tokens
        if second.milliseconds > 1000 * seconds / 3:
            found: dict[str, Any] = {"generator": "urllib", "requests": 1, "errors": 0, "note": SLOW}
            recorder.add(target.system, cell, **columns, **found, **latencies([second.milliseconds]))
            return
        if bench is None:
            found = wrk.closed_loop(target, cell, 1, seconds, seed)
        else:
            found = bench.closed_loop(target, cell, 1, second.milliseconds, seconds, seed)
    except RuntimeError as error:
        recorder.add(target.system, cell, **columns, note=str(error)[:300])
        return
    recorder.add(target.system, cell, **columns, **found)


if __name__ == "__main__":
    sys.exit(main())
