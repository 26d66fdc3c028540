"""An engine whose API is on another machine ends with it, and a supervisor can start both anew."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from nezha_vllm.engine.settings import ServerSettings
from nezha_vllm.heartbeat import until_head_is_gone

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.nezha")


def end_with_head(vllm_config: VllmConfig) -> None:
    """In the process of such an engine (`vllm serve --headless`), wait in a thread for the end of its API.

    Elsewhere do nothing.
    """
    parallel = vllm_config.parallel_config
    rank, rank_here = getattr(parallel, "data_parallel_index", 0), parallel.data_parallel_rank_local
    if "VLLM_DP_SIZE" in os.environ:  # several scripts with an `LLM` each, which need no API
        return
    if parallel.local_engines_only or rank_here is None or rank <= rank_here or parallel.data_parallel_backend != "mp":
        return
    from vllm import envs

    address = (parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)
    version = ServerSettings.from_vllm(vllm_config).catalogue_version or ""

    def wait_and_end() -> None:
        reason = until_head_is_gone(address, rank, version, envs.VLLM_ENGINE_READY_TIMEOUT_S)
        logger.error("NEZHA: the API of this engine, on %s, is gone: %s. The engine ends", address[0], reason)
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True, name="nezha-head").start()
