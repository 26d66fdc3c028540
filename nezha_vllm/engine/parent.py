"""An engine's process ends with the one that started it.

vLLM 0.32 leaves it behind, with all its GPU memory, when its parent is killed: the next start fails for want of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

ENGINE = "EngineCore"  # what vLLM calls the process


def in_its_own_process() -> bool:
    """Whether this process is there for an engine alone, and not a user's with an engine inside."""
    return multiprocessing.current_process().name.startswith(ENGINE)


def end_with_parent() -> None:
    """In an engine's process of its own, wait in a thread for the parent's end; elsewhere do nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or not in_its_own_process():
        return

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True, name="nezha-parent").start()
