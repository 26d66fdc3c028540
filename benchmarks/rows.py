"""Rows: one measurement each, in one append-only CSV a command."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_name("results")
ITEM_TOKENS = " item tokens"  # end of the settings of kernels with item scores, behind how many items have a token
BEHIND = 0.95  # of an open loop's rate: what answers fewer requests/s fell behind it


@dataclass
class Row:
    """One measurement; None where a figure does not apply or could not be had, which ``note`` then explains.

    ``items`` are those of the catalogue that was searched; prompts are of the checkpoint's own.
    ``prompt_tokens`` is the size that was asked for, ``engine_tokens`` what the engine read, placeholders included.
    ``load`` is "one" (a request after the other), "closed" (``concurrency`` clients), "open" (Poisson arrivals at
    ``request_rate``) or "batch" (``concurrency`` prompts in one call). ``generator`` is what sent the requests.
    Of a ``part`` of a request, a kernel say, ``us`` is the median time with warm caches, ``cold_us`` with an L2 that
    holds something else, ``floor_us`` what its bytes and operations take at the two ceilings.
    ``engine_cores`` and ``api_cores`` are the cores that the busiest process of the kind used under that load,
    ``gpu_busy`` is the share of the time in which the busiest GPU ran something while the load warmed up (up to commit
    20a47b5c, while it was measured), and ``stolen`` the share of the time in which cores had work that a hypervisor
    gave to others: a tail with it is not the server's.
    """

    # where and when; `machine.describe` fills them
    date: str = ""
    commit: str = ""
    gpu: str = ""
    driver: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    vllm: str = ""
    transformers: str = ""
    # what
    benchmark: str = ""
    system: str = ""
    model: str = ""
    part: str = ""
    dtype: str = ""
    prompt_tokens: int | None = None
    engine_tokens: int | None = None
    levels: int | None = None
    codes: int | None = None
    hidden: int | None = None
    items: int | None = None
    beam_width: int | None = None
    n: int | None = None
    # how
    transport: str = ""
    load: str = ""
    concurrency: int | None = None
    request_rate: float | None = None
    generator: str = ""
    prefix_caching: bool | None = None
    settings: str = ""
    # found
    requests: int | None = None
    errors: int | None = None
    seconds: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    requests_per_s: float | None = None
    us: float | None = None
    cold_us: float | None = None
    floor_us: float | None = None
    launches: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    ceiling_gb_per_s: float | None = None
    ceiling_tflop_per_s: float | None = None
    engine_cores: float | None = None
    api_cores: float | None = None
    gpu_busy: float | None = None
    stolen: float | None = None
    note: str = ""

    @property
    def times_floor(self) -> float | None:
        """How many times its floor a part takes: cold where that was measured, since the floor reads from memory."""
        us = self.cold_us or self.us
        return us / self.floor_us if us and self.floor_us else None


COLUMNS = [field.name for field in fields(Row)]
_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int | None": int,
    "float | None": float,
    "bool | None": lambda text: text == "True",
}


def append(name: str, rows: Row | Iterable[Row], folder: str | os.PathLike[str] = RESULTS) -> Path:
    """Add rows to ``folder/NAME.csv``, several processes at once if need be; returns the file.

    A file with other columns, from an earlier version, is rewritten with today's.
    """
    path = Path(folder) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = list(csv.reader(file))
        new = [_cells(row) for row in ([rows] if isinstance(rows, Row) else rows)]
        if found and found[0] != COLUMNS:
            new = [_cells(_row(dict(zip(found[0], line, strict=False)))) for line in found[1:]] + new
            file.truncate(0)
            found = []
        csv.writer(file, lineterminator="\n").writerows(new if found else [COLUMNS, *new])
    return path


def read(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a file, oldest first. Raises ``ValueError`` naming the line that is no row."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = []
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                rows.append(_row(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, numpy's default. Raises ``ValueError`` without values."""
    if not values:
        raise ValueError("no values to take a percentile of")
    return float(np.percentile(values, percent))


def latencies(milliseconds: Sequence[float]) -> dict[str, float]:
    """The three percentile columns of a row."""
    return {f"p{percent}_ms": round(percentile(milliseconds, percent), 3) for percent in (50, 90, 99)}


def _cells(row: Row) -> list[str]:
    values = (getattr(row, name) for name in COLUMNS)
    return ["" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]


def _row(line: dict[str, str]) -> Row:
    known = {field.name: _READ[str(field.type)] for field in fields(Row)}
    return Row(**{name: known[name](text) for name, text in line.items() if name in known and text})
