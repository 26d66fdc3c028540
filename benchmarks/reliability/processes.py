"""Processes of a server and their memory, read from /proc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import of_gpus

FEW = 10  # samples, of which fifths say nothing


def processes(group: int) -> dict[str, int]:
    """Process numbers of a process group by the names that vLLM gives them, such as ``EngineCore`` and ``Worker 2``."""
    found: dict[str, int] = {}
    names: Counter[str] = Counter()
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if os.getpgid(int(entry.name)) != group or "RssAnon" not in (entry / "status").read_text():
                continue  # another's, or one that has ended and waits to be asked for its status
            title = (entry / "cmdline").read_text().replace("\0", " ")
        except (ProcessLookupError, FileNotFoundError):
            continue
        match = re.search(r"(VLLM::\w+|resource_tracker|vllm serve)", title)
        name = match[1].removeprefix("VLLM::") if match else "other"
        names[name] += 1
        found[f"{name}{'' if names[name] == 1 else f' {names[name]}'}"] = int(entry.name)
    return found


def resident_bytes(group: int) -> dict[str, int]:
    """Memory of each process of a process group that is its own.

    Pages of mapped files are left out: the kernel takes them back when it needs them, and processes share them.
    """
    return _memory(group, "RssAnon")


def file_bytes(group: int) -> dict[str, int]:
    """Pages of mapped files that are in memory for each process; those of libraries among them."""
    return _memory(group, "RssFile")


def _memory(group: int, field: str) -> dict[str, int]:
    found = {}
    for name, number in processes(group).items():
        try:
            status = Path(f"/proc/{number}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            found[name] = int(fields[field].split()[0]) << 10
        except (ProcessLookupError, FileNotFoundError, KeyError):  # it ended, or is ending
            continue
    return found


def used_bytes(group: int) -> dict[str, int]:
    """`resident_bytes` and `gpu_bytes`, which holds the GPU's driver for some 10 ms: not while a load is measured."""
    return resident_bytes(group) | gpu_bytes()


def gpu_bytes() -> dict[str, int]:
    """Of the GPUs in ``CUDA_VISIBLE_DEVICES``, or of all, what anything uses of their memory; empty without nvidia-smi.

    Of whole GPUs: in a container it does not know the processes.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    argv = ["nvidia-smi", *of_gpus(), "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(argv, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(",") for line in lines if re.fullmatch(r"\d+, *\d+", line)]
    return {f"GPU {index}": int(used) << 20 for index, used in rows}


def print_memory(samples: Sequence[dict[str, int]]) -> None:
    """What became of the memory of each process, and GPU, of the last sample; not all need to be in each sample."""
    for name in samples[-1]:
        sizes = [sample[name] / 2**20 for sample in samples if name in sample]
        if len(sizes) < FEW:
            print(f"{name}: {', '.join(f'{size:.0f}' for size in sizes)} MiB")
            continue
        fifth = len(sizes) // 5
        early, late = np.mean(sizes[fifth : 2 * fifth]), np.mean(sizes[-fifth:])
        print(f"{name}: {sizes[0]:.0f} MiB at first, {early:.0f} in the second fifth, {late:.0f} in the last, ", end="")
        print(f"{max(sizes):.0f} at most")
