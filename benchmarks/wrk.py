"""Load by `wrk`, which is written in C, so that it does not become what is measured.

Closed loop: C clients, each sends its next request when the last is answered. Open loop: many users, each of whom
pauses for an exponential time in front of a request. As long as pauses are long beside answers, arrivals are Poisson.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.rows import BEHIND
from benchmarks.served import Target
from benchmarks.usage import watching, watching_gpus
from benchmarks.workload import Cell

USERS = 512  # of an open loop, at least
WARM_UP_SECONDS = 2
PAUSE_SECONDS = 0.25  # of each at least, many times what an answer takes
SCRIPT = Path(__file__).with_name("wrk.lua")
INSTALL = "wrk is not installed (Debian, Ubuntu: apt install wrk)"


def installed() -> bool:
    return shutil.which("wrk") is not None


def closed_loop(target: Target, cell: Cell, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Columns of a row. Raises ``RuntimeError`` with wrk's words if it measured nothing."""
    with nullcontext({}) if target.group is None else watching_gpus(target.gpus) as busy:
        _load(target, cell, clients, 0, WARM_UP_SECONDS, seed + 1)
    return {"generator": version()} | busy | _load(target, cell, clients, 0, seconds, seed)


def open_loop(target: Target, cell: Cell, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Arrivals at ``rate`` requests/s in all, plain JSON answers. Columns of a row."""
    users = USERS * max(1, math.ceil(rate * PAUSE_SECONDS / USERS))
    found = _load(target, cell, users, round(1000 * users / rate), seconds, seed)
    if found["requests_per_s"] < BEHIND * rate:
        found["note"] = f"fell behind the arrivals: {found['requests_per_s']:.0f} of {rate:.0f} req/s"
    return {"generator": f"{version()}, {users:,} users"} | found


def threads(clients: int) -> int:
    """A quarter of the cores that this process may use, at most one a client."""
    return min(clients, max(1, len(os.sched_getaffinity(0)) // 4))


def _load(target: Target, cell: Cell, clients: int, pause_ms: int, seconds: float, seed: int) -> dict[str, Any]:
    body = json.dumps(target.body(cell))
    argv = ["wrk", "--latency", "-t", str(threads(clients)), "-c", str(clients), "-d", f"{max(1, round(seconds))}s"]
    # of the longest request; wrk sets aside 8 MB a second of it, and never touches most of that
    argv += ["--timeout", f"{max(10, round(2 * seconds))}s", "-s", str(SCRIPT), f"{target.url}/v1/completions", "--"]
    argv += [_items(target), body[:-1] + ', "prompt": "', '"}', str(target.workload.history_items(cell.prompt_tokens))]
    argv += [str(seed), str(pause_ms)]
    with watching(target.group) as busy:
        run = subprocess.run(argv, capture_output=True, text=True, timeout=60 + 3 * seconds)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"requests": 0}
    if not found["requests"]:
        raise RuntimeError(f"wrk measured nothing in {seconds:.0f} s: {(run.stderr or run.stdout)[-300:].strip()}")
    return {
        "requests": found["requests"],
        "errors": found["errors"],
        "seconds": found["seconds"],
        "p50_ms": found["p50"] / 1000,
        "p90_ms": found["p90"] / 1000,
        "p99_ms": found["p99"] / 1000,
        "requests_per_s": found["requests"] / found["seconds"],
        **busy,
    }


@cache
def version() -> str:
    words = subprocess.run(["wrk", "--version"], capture_output=True, text=True).stdout.split()
    return f"wrk {words[1].removeprefix('debian/')}" if len(words) > 1 else "wrk"


_written: dict[str, str] = {}


def _items(target: Target) -> str:
    """A file of the texts of all items, each as it stands inside a JSON string."""
    if target.url not in _written:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix="nezha-items-", delete=False) as file:
            file.writelines(json.dumps(text)[1:-1] + "\n" for text in target.texts)
        _written[target.url] = file.name
    return _written[target.url]
