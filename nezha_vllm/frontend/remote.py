"""The server ends when an engine of another machine is gone, as vLLM ends it for one of its own machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from nezha_vllm.frontend.service import Service
from nezha_vllm.heartbeat import RemoteEngines

logger = logging.getLogger("vllm.nezha")


def watch_remote_engines(engine: Any) -> None:
    """Begin to, in the first of the API processes, where there are any; needs a running event loop."""
    parallel, core = engine.vllm_config.parallel_config, engine.engine_core
    service = getattr(engine.renderer, "current", None)
    ranks = range(parallel.data_parallel_size_local, parallel.data_parallel_size)
    backend = getattr(parallel, "data_parallel_backend", "mp")
    if not isinstance(service, Service) or parallel.local_engines_only or backend != "mp" or not ranks:
        return
    if parallel.data_parallel_size_local == 0:  # then ranks start at 0 elsewhere, too, and no engine knows that it is
        return
    if core.client_index != 0 or hasattr(engine, "nezha_remote_engines"):
        return

    def lost(reason: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if core.resources.engine_dead:
            return
        logger.error("NEZHA: %s. The server ends, start it and the other machines' engines again", reason)
        core.resources.engine_dead = True
        core.outputs_queue.put_nowait(EngineDeadError())

    remote = RemoteEngines(ranks, service.catalogue.version, lost)
    address = (parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)
    engine.nezha_remote_engines = asyncio.get_running_loop().create_task(remote.watch(*address))
