"""An engine whose workers are Ray actors ends when one of them has, whatever it waits for.

vLLM 0.32 sees that an actor has died, stops the others and puts a word into the engine's queue. An engine that waits
for that worker's answer from another node reads no queue: it hung for 300 s with a request
(``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``), for ever with a call that has no limit, such as the swap of a catalogue, and
``/health`` stayed 200.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from nezha_vllm.engine.parent import in_its_own_process

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.nezha")

MONITOR = "RayWorkerMonitor"  # what vLLM calls the thread that watches the actors, and ends with the first of them
GRACE = 10.0  # seconds that an engine has to end by itself


def end_with_workers(vllm_config: VllmConfig) -> None:
    """In an engine's process of its own, wait in a thread for the end of vLLM's watch over its Ray actors.

    Elsewhere do nothing.
    """
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend != "ray":
        return
    if not (in_its_own_process() or parallel.data_parallel_backend == "ray"):  # there, engines are actors themselves
        return
    monitor = next((thread for thread in threading.enumerate() if thread.name == MONITOR), None)
    if monitor is None:
        logger.warning("NEZHA: this vLLM has no thread %s: a Ray worker that dies may leave requests waiting", MONITOR)
        return

    def wait_and_end() -> None:
        monitor.join()
        time.sleep(GRACE)
        logger.error("NEZHA: vLLM's watch over this engine's Ray workers has ended: one is gone, or Ray is. So it ends")
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True, name="nezha-workers").start()
