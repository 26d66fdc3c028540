"""A step in a process of its own, as in use: how long it took and the most memory that it had."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

PART_OF_NO_STEP = ("pyarrow.compute", "nezha_vllm.store")  # imported before the clock runs


def apart(step: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    """Seconds, and the most that was resident in bytes, pages of mapped files included. Raises what the step does."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_timed, step, *arguments).result()


def _timed(step: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    for module in PART_OF_NO_STEP:
        import_module(module)
    begun = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
