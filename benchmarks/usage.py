"""What a load keeps busy: cores and the processes of the server, by /proc, and GPUs, by ``nvidia-smi``.

``nvidia-smi`` stops the GPU's host for some 10 ms each time it looks: five looks a second make p99 its own. So GPUs are
watched while a load warms up, and not while it is measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import of_gpus
from benchmarks.reliability.processes import processes

KINDS = {"EngineCore": "engine_cores", "ApiServer": "api_cores", "APIServer": "api_cores", "vllm serve": "api_cores"}
SAMPLE_MS = 200


@contextmanager
def watching(group: int | None) -> Iterator[dict[str, float]]:
    """Columns of a row for the time of the block, filled when it ends; none for a server of another machine.

    Args:
        group: process group of the server.
    """
    found: dict[str, float] = {}
    if group is None:
        yield found
        return
    before, begun, machine = _cpu_seconds(group), time.perf_counter(), _machine_ticks()
    try:
        yield found
    finally:
        seconds = time.perf_counter() - begun
        after = _cpu_seconds(group)
        worked, stolen = (now - then for now, then in zip(_machine_ticks(), machine, strict=True))
        if worked + stolen:
            found["stolen"] = stolen / (worked + stolen)
    for name in after.keys() & before.keys():
        for beginning, column in KINDS.items():
            if name.startswith(beginning):
                found[column] = max(found.get(column, 0.0), (after[name] - before[name]) / seconds)


@contextmanager
def watching_gpus(gpus: str = "") -> Iterator[dict[str, float]]:
    """``gpu_busy`` for the time of the block, filled when it ends, if there are GPUs.

    Args:
        gpus: indices, as in ``CUDA_VISIBLE_DEVICES``, which rules if empty.
    """
    found: dict[str, float] = {}
    sampler = _sample_gpus(gpus)
    try:
        yield found
    finally:
        if sampler is not None:
            sampler.terminate()
            text, _ = sampler.communicate(timeout=10)
            if (busy := busiest_gpu(text)) is not None:
                found["gpu_busy"] = busy


def busiest_gpu(text: str) -> float | None:
    """Of lines "index, percent", the share of the GPU with the highest mean; the first line of each is of before."""
    percents: dict[str, list[float]] = defaultdict(list)
    for line in text.splitlines():
        index, _, percent = line.partition(",")
        if percent.strip().isdigit():
            percents[index].append(float(percent))
    means = [sum(values[1:]) / len(values[1:]) for values in percents.values() if len(values) > 1]
    return max(means) / 100 if means else None


def _sample_gpus(gpus: str) -> subprocess.Popen[str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]
    return subprocess.Popen(
        ["nvidia-smi", *of_gpus(gpus), *asked], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _machine_ticks() -> tuple[int, int]:
    """Of all cores since the machine started: at work, and waiting for a hypervisor while there was work."""
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return user + nice + system + interrupts + soft, stolen


def _cpu_seconds(group: int) -> dict[str, float]:
    """User and system time of all threads of each process."""
    found = {}
    for name, number in processes(group).items():
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except (ProcessLookupError, FileNotFoundError):
            continue
        found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found
