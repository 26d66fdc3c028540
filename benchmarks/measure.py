"""Turning a system's answers into rows: the part that offline and HTTP share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.additional import nezha_options
from benchmarks.machine import describe
from benchmarks.rows import Row, append
from benchmarks.workload import Cell, Workload
from nezha_vllm.pointer import is_store, read_steadily, version_folder

WARM_UPS = 5
SHOWN = {
    "system": "system",
    "over": "transport",
    "prompt": "engine_tokens",
    "K": "beam_width",
    "n": "n",
    "load": "load",
    "clients": "concurrency",
    "rate": "request_rate",
    "p50 ms": "p50_ms",
    "p90": "p90_ms",
    "p99": "p99_ms",
    "req/s": "requests_per_s",
    "requests": "requests",
    "errors": "errors",
    "note": "note",
}


class Recorder:
    """Writes each row to its CSV when it is measured, and prints all of them at the end."""

    def __init__(self, benchmark: str, arguments: argparse.Namespace, workload: Workload) -> None:
        self.benchmark, self.arguments, self.workload = benchmark, arguments, workload
        self.rows: list[Row] = []

    def add(self, system: str, cell: Cell, **columns: Any) -> Row:
        config, arguments = self.workload.config, self.arguments
        row = Row(
            **describe(),
            benchmark=self.benchmark,
            system=system,
            model=arguments.label,
            dtype=str(config.get("dtype", "")),
            prompt_tokens=cell.prompt_tokens,
            levels=self.workload.levels,
            codes=max(config["codebook_sizes"]),
            items=self.items if system == "nezha" else self.workload.catalogue.num_items,
            beam_width=cell.beam_width,
            n=cell.n,
            **({"settings": " ".join(arguments.vllm_args), "transport": arguments.over} | columns),
        )
        append(self.benchmark, row, arguments.results)
        self.rows.append(row)
        return row

    @cached_property
    def items(self) -> int:
        """Of the catalogue that NEZHA is told to take; prompts are of the checkpoint's own whatever it is.

        By the manifest: 100 million items take a minute and 10 GiB to load.
        """
        options = nezha_options(self.arguments.vllm_args)
        if "catalogue" not in options:
            return self.workload.catalogue.num_items
        folder, version = Path(self.arguments.model, options["catalogue"]), options.get("catalogue_version")
        if version is not None and is_store(folder):
            folder = version_folder(folder, version)
        items: int = read_steadily(folder, lambda _, manifest: manifest["num_items"])
        return items

    def print(self) -> None:
        print_rows(self.rows, f"{self.benchmark}, {self.arguments.label}")


def run(
    benchmark: str,
    arguments: argparse.Namespace,
    over_http: Callable[[Recorder, argparse.Namespace, Workload], None],
    offline: Callable[[Recorder, argparse.Namespace, Workload], None],
    summary: Callable[[Recorder], None] = lambda _: None,
) -> None:
    """Measure one way or the other; what was measured is printed whatever happens."""
    workload = Workload.of(arguments.model)
    recorder = Recorder(benchmark, arguments, workload)
    try:
        (over_http if arguments.over == "http" else offline)(recorder, arguments, workload)
    finally:
        recorder.print()
        summary(recorder)


def print_rows(rows: Sequence[Row], title: str, columns: Mapping[str, str] = SHOWN) -> None:
    """A short table of ``columns``, head to attribute of a row; those that no row fills are left out."""
    shown = {head: [_text(getattr(row, name)) for row in rows] for head, name in columns.items()}
    shown = {head: cells for head, cells in shown.items() if any(cells)}
    table = Table(title=title)
    for head in shown:
        table.add_column(head, justify="left" if isinstance(getattr(Row(), columns[head]), str) else "right")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    # a log file has no width: without one, rich folds the table to 80 columns
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def one_by_one(answer: Callable[[list[int]], object], prompts: Iterator[list[int]], seconds: float) -> list[float]:
    """Milliseconds of requests made one after the other, after warm-up, until the budget is spent; one at least.

    A system so slow that a single request takes more than the budget gets one warm-up and one measured request.
    """
    repeat(lambda: answer(next(prompts)), WARM_UPS, seconds)
    return repeat(lambda: answer(next(prompts)), 2000, seconds)


def repeat(action: Callable[[], object], most: int, seconds: float) -> list[float]:
    """Milliseconds of each call of ``action``: at least one call, then until ``most`` or the budget is reached."""
    spent: list[float] = []
    while not spent or (len(spent) < most and sum(spent) < 1000 * seconds):
        start = time.perf_counter()
        action()
        spent.append(1000 * (time.perf_counter() - start))
    return spent


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
