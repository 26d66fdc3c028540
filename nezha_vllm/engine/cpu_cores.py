"""Cores for several workers on one CPU machine: each gets a share of its own.

Left alone, vLLM wants a NUMA node for each rank of tensor parallelism, and puts all engines of data parallelism on the
same cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import pairwise

logger = logging.getLogger("vllm.nezha")

BIND = "VLLM_CPU_OMP_THREADS_BIND"
_ours: str | None = None  # what an earlier engine of this process was given


def share_cores(num_engines: int, workers_each: int) -> None:
    """Set vLLM's list of cores for the workers of this machine, in order of their ranks; what the user has set stays.

    Engines and workers inherit the environment of the process that calls this.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

    global _ours
    if _ours is not None and os.environ.get(BIND) == _ours:
        del os.environ[BIND]
    if BIND in os.environ or "VLLM_CPU_SIM_MULTI_NUMA" in os.environ:
        return
    if num_engines == 0 or (num_engines == 1 and workers_each <= len(get_visible_memory_node())):
        return
    # one thread of every core, nodes one after the other
    cores = {cpu.physical_core: (cpu.numa_node, cpu.id) for cpu in reversed(get_allowed_cpu_list())}
    _ours = os.environ[BIND] = core_lists([core for _, core in sorted(cores.values())], num_engines * workers_each)
    logger.info("NEZHA: %s=%s, set it yourself for other cores", BIND, os.environ[BIND])


def core_lists(cores: Sequence[int], num_workers: int) -> str:
    """Shares as even as can be, neighbours together: ``0,1|3,4`` of six cores for two.

    Like vLLM, this leaves the last core of a share to other processes where there is another. Workers share cores
    where there are fewer of them.
    """
    if len(cores) < num_workers:
        return "|".join(str(cores[worker % len(cores)]) for worker in range(num_workers))
    bounds = [worker * len(cores) // num_workers for worker in range(num_workers + 1)]
    shares = [cores[low:high] for low, high in pairwise(bounds)]
    return "|".join(",".join(map(str, share[:-1] or share)) for share in shares)
