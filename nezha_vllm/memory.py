"""How much memory there is for more, on the machine, in the container, on the device; and giving it back."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import pyarrow as pa
import torch

from nezha_vllm.manifest import CatalogueError

CGROUP = Path("/sys/fs/cgroup")
SPARE_BYTES = 256 << 20  # left for everything else


def available_bytes(device: torch.device | None = None) -> int:
    """What can be allocated without swapping: on a GPU with what PyTorch keeps for later, else in main memory."""
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + _unused_segments(device)
    available = psutil.virtual_memory().available
    left = _left_in_container()
    return available if left is None else min(available, left)


def check_fits(needed: int, what: str, device: torch.device | None = None) -> None:
    """Raise ``CatalogueError`` unless ``needed`` bytes and some to spare are available."""
    available = available_bytes(device)
    if needed + SPARE_BYTES > available:
        raise CatalogueError(
            f"{what} needs {needed >> 20} MiB beside the one in use and {SPARE_BYTES >> 20} MiB to spare, "
            f"{available >> 20} MiB are available; free memory, or restart the server to take it up"
        )


def give_back() -> None:
    """Return to the system what was freed but kept for later: of 98 bytes an item that loading takes, 50 stay else."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _unused_segments(device: torch.device) -> int:
    """What PyTorch has and can use for anything: whole segments, and none of CUDA graphs' own pools."""
    segments = torch.cuda.memory_snapshot()
    there = (s for s in segments if s["device"] == device.index and tuple(s["segment_pool_id"]) == (0, 0))
    return sum(s["total_size"] for s in there if s["allocated_size"] == 0)


def _left_in_container() -> int | None:
    """Of the memory limit of the control group, version 2 or 1; None without one. Pages of files can be given up."""
    for limit_file, used_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ):
        try:
            limit, used = ((CGROUP / name).read_text().strip() for name in (limit_file, used_file))
            lines = (CGROUP / limit_file).with_name("memory.stat").read_text().splitlines()
            statistics = {name: int(number) for name, number in map(str.split, lines)}
            if limit == "max":
                return None
            files = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
            return int(limit) - int(used) + files
        except (OSError, ValueError):
            continue
    return None
