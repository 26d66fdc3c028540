"""Measured rows of ``benchmarks/results`` as load curves: one model, one kind of request, many loads."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_TOKENS = 4096  # max_num_batched_tokens where the settings name no other and every prompt fits (config_hook.py)
OLDER_STEP_TOKENS = {"3fe91bed": 8192}  # by commit: vLLM's own
STEP_BY_STEP = ("3fe91bed", "0db5411", "20e18dd5")  # commits whose servers overlapped no steps unless told to
FULL_STEP = 64  # requests of the fullest step of which the draft stage was measured


class PlanError(ValueError):
    """What is asked for was not measured; the message says what was, and what to do."""


@dataclass(frozen=True)
class Load:
    """One row. ``clients`` of a closed loop or the ``rate`` of an open one; milliseconds, and requests/s.

    An open loop is of ``users``, each with a connection, who pause for exponential times between answer and request, or
    of Poisson arrivals, where that is None. ``streamed``: item by item.
    """

    clients: int | None
    rate: float | None
    requests: int
    p50: float
    p99: float
    requests_per_s: float
    kept_up: bool
    users: int | None = None
    streamed: bool = False

    @property
    def pause_ms(self) -> float:
        """Of a user, in the mean: at ``rate`` requests/s in all if answers took no time."""
        return 1000 * (self.users or 0) / self.rate if self.rate else 0.0

    @property
    def arrivals_per_s(self) -> float:
        """Of an open loop. Users who wait for an answer send nothing: the longer they wait, the fewer arrive."""
        return self.requests_per_s if self.users else self.rate or 0.0


@dataclass(frozen=True)
class Cell:
    """A kind of request: what was measured together."""

    gpu: str
    model: str
    prompt_tokens: int
    beam_width: int
    n: int
    items: int


@dataclass(frozen=True)
class Curve:
    cell: Cell
    settings: str
    engine_tokens: int
    commit: str
    date: str
    loads: tuple[Load, ...]

    @property
    def closed(self) -> list[Load]:
        return sorted((load for load in self.loads if load.clients), key=lambda load: load.clients or 0)

    @property
    def open(self) -> list[Load]:
        return sorted((load for load in self.loads if load.rate), key=lambda load: load.rate or 0)

    @property
    def usable(self) -> bool:
        """Whether there are loads enough to fit the times of a server to, which has one engine on one GPU."""
        gpus = self._flag("data-parallel-size", 1) * self._flag("tensor-parallel-size", 1)
        return len(self.open) >= 2 and len(self.closed) >= 2 and gpus == 1

    @property
    def max_requests(self) -> int:
        """Most requests of a step."""
        default = max(OLDER_STEP_TOKENS.get(self.commit, STEP_TOKENS), self.engine_tokens)
        return min(256, int(self._flag("max-num-batched-tokens", default)) // self.engine_tokens)

    @property
    def overlapping(self) -> bool:
        """Whether a step was scheduled while another ran."""
        asked = re.search(r"--(no-)?async-scheduling", self.settings)
        return asked[1] is None if asked else self.commit not in STEP_BY_STEP

    @property
    def api_processes(self) -> int:
        return int(self._flag("api-server-count", 1))

    def _flag(self, name: str, default: int) -> int:
        found = re.search(rf"--{name}[ =](\d+)", self.settings)
        return int(found[1]) if found else default


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one benchmark's file. Raises ``PlanError``."""
    if not path.is_file():
        raise PlanError(f"{path} is missing; name the folder of measured rows with --results")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_curves(results: Path) -> list[Curve]:
    """Curves over HTTP of one commit each, the newest first, without prefix-cache hits.

    Clean rows only: no errors, and no ``note`` but that a load was too high.
    """
    groups: dict[tuple[Cell, str, str], list[dict[str, Any]]] = {}
    for row in read_rows(results / "throughput.csv"):
        noted = bool(row["note"]) and not row["note"].startswith("fell behind")
        served = row["system"] == "nezha" and row["transport"] == "http" and row["load"] in ("closed", "open")
        if served and not noted and row["errors"] == "0" and row["prefix_caching"] == "False":
            groups.setdefault((_cell(row), row["settings"], row["commit"]), []).append(row)
    curves = [
        Curve(
            cell,
            settings,
            int(rows[0]["engine_tokens"]),
            commit,
            max(row["date"] for row in rows),
            tuple(_load(row) for row in rows),
        )
        for (cell, settings, commit), rows in groups.items()
    ]
    return sorted(curves, key=lambda curve: curve.date, reverse=True)


def milliseconds_a_token(results: Path, cell: Cell, tokens: int) -> float:
    """What a longer prompt adds to a single request, from one-client rows of the model up to ``tokens`` or more.

    Raises ``PlanError`` if no prompt as long was measured.
    """
    alone: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row in read_rows(results / "latency.csv"):
        same = row["system"] == "nezha" and row["transport"] == "http" and row["concurrency"] == "1"
        if same and row["model"] == cell.model and row["gpu"] == cell.gpu and row["prefix_caching"] == "False":
            key = (int(row["beam_width"]), int(row["n"]))
            alone.setdefault(key, []).append((int(row["prompt_tokens"]), float(row["p50_ms"])))
    slopes = []
    longest = max((length for found in alone.values() for length, _ in found), default=0)
    for found in alone.values():
        base = [(length, p50) for length, p50 in found if length == cell.prompt_tokens]
        slopes += [(p50 - at) / (length - short) for short, at in base for length, p50 in found if length > short]
    if longest < tokens or not slopes:
        raise PlanError(
            f"prompts of {tokens} tokens: the longest measured for {cell.model} has {longest}; measure with "
            f"`python -m benchmarks.latency --prompts {tokens}`"
        )
    return max(slopes)


@dataclass(frozen=True)
class LargerCatalogue:
    """What a catalogue of ``items`` adds to each request of a step; ``measured`` unless carried over from ``width``."""

    items: int
    milliseconds: float
    width: int
    measured: bool


def larger_catalogue(results: Path, cell: Cell, beam_width: int, items: int) -> LargerCatalogue:
    """The draft stage at a catalogue of ``items`` or more, beside the stage at the load curve's.

    Where no beams as wide were measured there, the widest that were say by how much the stage grows. Raises
    ``PlanError`` beyond the largest catalogue measured.
    """
    if items <= cell.items:
        return LargerCatalogue(cell.items, 0.0, beam_width, True)
    stages = {}
    for row in read_rows(results / "validity.csv"):
        if row["part"] == "draft stage" and row["settings"].startswith("stepwise, tables"):
            stages[int(row["items"]), int(row["beam_width"]), int(row["concurrency"])] = float(row["us"])
    both = [
        (size, width, batch) for size, width, batch in stages if size >= items and (cell.items, width, batch) in stages
    ]
    if not both:
        most = max((size for size, _, _ in stages), default=0)
        raise PlanError(
            f"{items:,} items: the largest catalogue measured has {most:,}; measure with `python -m "
            "benchmarks.validity`"
        )
    wide = [key for key in both if key[1] >= beam_width and key[2] == FULL_STEP]
    if wide:
        size, width, batch = min(wide)
        more_us = stages[size, width, batch] - stages[cell.items, width, batch]
        return LargerCatalogue(size, max(0.0, more_us) / batch / 1000, width, True)
    size, width, batch = max(both, key=lambda key: (key[1], key[2]))
    growth = stages[size, width, batch] / stages[cell.items, width, batch] - 1
    at_full = max(us for (size_, width_, batch_), us in stages.items() if size_ == cell.items and batch_ == FULL_STEP)
    return LargerCatalogue(size, max(0.0, growth) * at_full / FULL_STEP / 1000, width, False)


def newest(curves: Sequence[Curve]) -> list[Curve]:
    """Of each kind of request the newest curve with closed and open loops, or just the newest where none has both."""
    found: dict[Cell, Curve] = {}
    for curve in sorted(curves, key=lambda curve: not curve.usable):  # in their order otherwise
        found.setdefault(curve.cell, curve)
    return sorted(found.values(), key=lambda curve: (curve.usable, curve.date), reverse=True)


def choose(curves: Sequence[Curve], model: str, beam_width: int, n: int) -> Curve:
    """The curve with Poisson arrivals whose requests cost least among those that cost no less than the ones asked for.

    Raises ``PlanError`` naming what there is.
    """
    usable = [curve for curve in curves if curve.usable]
    enough = [
        curve
        for curve in usable
        if curve.cell.model == model and curve.cell.beam_width >= beam_width and curve.cell.n >= n
    ]
    if not enough:
        there = "; ".join(
            f"{curve.cell.model}, {curve.cell.prompt_tokens} tokens, K = {curve.cell.beam_width}, n = {curve.cell.n}"
            for curve in usable
        )
        raise PlanError(
            f"no load curve of {model} with K ≥ {beam_width} and n ≥ {n} has both closed and open loops. There are: "
            f"{there or 'none'}. Measure with `python -m benchmarks.throughput --model … --beams {beam_width}:{n} "
            "--rates auto`"
        )
    return min(enough, key=lambda curve: (curve.cell.beam_width, curve.cell.n, curve.cell.prompt_tokens))  # the newest


def _cell(row: dict[str, Any]) -> Cell:
    numbers = (int(row[name]) for name in ("prompt_tokens", "beam_width", "n", "items"))
    return Cell(row["gpu"], row["model"], *numbers)


def _load(row: dict[str, Any]) -> Load:
    users = re.search(r"([\d,]+) users", row["generator"])
    return Load(
        int(row["concurrency"]) if row["load"] == "closed" else None,
        float(row["request_rate"]) if row["load"] == "open" else None,
        int(row["requests"]),
        float(row["p50_ms"]),
        float(row["p99_ms"]),
        float(row["requests_per_s"]),
        not row["note"] or users is not None,  # users cannot overtake a server
        int(users[1].replace(",", "")) if users else None,
        row["generator"].startswith("vllm bench"),
    )
