"""Rows of kernels: what they share, their floors, and the short tables at the end."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import floors
from benchmarks.machine import describe
from benchmarks.measure import print_rows
from benchmarks.rows import Row, append

SHOWN = {
    "system": "system",
    "part": "part",
    "items": "items",
    "N": "concurrency",
    "K": "beam_width",
    "settings": "settings",
    "µs": "us",
    "cold": "cold_us",
    "floor": "floor_us",
    "cold/floor": "times_floor",
    "GB/s": "gb_per_s",
    "TFLOP/s": "tflop_per_s",
    "launches": "launches",
    "note": "note",
}


class Recorder:
    """Measures the ceilings, writes each row when it is found, and keeps the time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from benchmarks.gpu_timing import ceilings, empty_launch_us

        self.arguments, self.start = arguments, time.perf_counter()
        self.name = "validity" if arguments.validity else "kernels"
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.sizes = (arguments.codes,) * arguments.levels
        self.ceilings = ceilings(self.dtype)
        self.empty_us = empty_launch_us()
        self.rows: list[Row] = []

    def late(self) -> bool:
        return time.perf_counter() - self.start > self.arguments.budget

    def add(self, system: str, part: str, *, work: floors.Work | None = None, **columns: Any) -> None:
        row = Row(
            **describe(),
            benchmark=self.name,
            system=system,
            part=part,
            dtype=self.arguments.dtype,
            levels=len(self.sizes),
            codes=self.sizes[0],
            hidden=self.arguments.hidden,
            load="batch",
            generator="CUDA events",
            ceiling_gb_per_s=self.ceilings.gb_per_s,
            ceiling_tflop_per_s=self.ceilings.tflop_per_s,
        )
        for name, value in columns.items():
            setattr(row, name, value)
        us = row.cold_us or row.us
        if work is not None and us:
            row.floor_us = work.floor_us(self.ceilings)
            row.gb_per_s, row.tflop_per_s = work.bytes / us / 1e3, work.flops / us / 1e6
        append(self.name, row, self.arguments.results)
        self.rows.append(row)

    def print(self) -> None:
        title = f"{self.name}, L = {len(self.sizes)}, T = {self.sizes[0]}, H = {self.arguments.hidden}"
        found = f"copy {self.ceilings.gb_per_s:,.0f} GB/s, {self.arguments.dtype} product"
        found += f" {self.ceilings.tflop_per_s:,.0f} TFLOP/s, an empty launch {self.empty_us:.2f} µs"
        if self.arguments.validity:
            from benchmarks.validity import costs

            print_rows(costs(self.rows), f"{title}\nwhat validity adds, µs", SHOWN)
            return
        cells = {(row.items, row.concurrency, row.beam_width) for row in self.rows}
        rows = [row for row in self.rows if row.part == "draft stage" or len(cells) <= 3]
        print_rows(rows, f"{title}\n{found}", SHOWN)
