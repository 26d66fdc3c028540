"""An engine ends with the thread in which vLLM watches its Ray actors, where the process is an engine's own."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nezha_vllm.engine import ray_workers


def watched(backend: str, seconds: float) -> None:
    """Body of a process: vLLM's watch ends, and after so many seconds the process by itself."""
    threading.Thread(target=time.sleep, args=(0.1,), name=ray_workers.MONITOR).start()
    ray_workers.GRACE = 0.1
    parallel = SimpleNamespace(distributed_executor_backend=backend, data_parallel_backend="mp")
    config: Any = SimpleNamespace(parallel_config=parallel)
    ray_workers.end_with_workers(config)
    time.sleep(seconds)


@pytest.mark.parametrize(
    ("name", "backend", "status"), [("EngineCore_DP1", "ray", 1), ("EngineCore", "mp", 0), ("MainProcess", "ray", 0)]
)
def test_an_engines_process_ends_with_the_watch_over_its_workers(name: str, backend: str, status: int) -> None:
    seconds = 30 if status else 0.5
    process = multiprocessing.get_context("fork").Process(target=watched, args=(backend, seconds), name=name)
    process.start()
    process.join(20)
    assert process.exitcode == status


def test_vllm_still_names_the_thread_so() -> None:
    import vllm

    executor = Path(vllm.__file__).with_name("v1") / "executor" / "ray_executor_v2.py"
    if not executor.exists():
        pytest.skip("a vLLM before that executor")
    text = executor.read_text()
    assert f'name="{ray_workers.MONITOR}"' in text
