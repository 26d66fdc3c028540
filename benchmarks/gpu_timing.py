"""Times on the GPU: ceilings of the device, medians of CUDA graph replays, and the duration of each kernel in one."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.floors import Ceilings

Action = Callable[[], object]
FLUSH_BYTES = 256 << 20  # five times the L2 cache of an H100


class Flush:
    """Fills the L2 cache with something else by reading, so that nothing has to be written back later."""

    def __init__(self) -> None:
        self.values = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self.total = torch.zeros((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self.values, dim=0, out=self.total)


def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure both: a copy of 2 GiB, and a product of two matrices of 8192² numbers of ``dtype``."""
    source = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source), 20)
    left = torch.randn(8192, 8192, device="cuda").to(dtype)
    right, product = torch.randn_like(left), torch.empty_like(left)
    matrix_us = median_us(lambda: torch.mm(left, right, out=product), 20)
    return Ceilings(2 * source.nbytes / copy_us / 1e3, 2 * 8192**3 / matrix_us / 1e6)


def empty_launch_us(launches: int = 200) -> float:
    """What a kernel that does next to nothing takes inside a CUDA graph, one behind the other."""
    one = torch.zeros(1, device="cuda")

    def chain() -> None:
        for _ in range(launches):
            one.add_(1)

    return median_us(capture(chain).replay, 20) / launches


def capture(action: Action) -> torch.cuda.CUDAGraph:
    """``action`` as a CUDA graph; it is called once before, so whatever it compiles is compiled."""
    action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph


def median_us(action: Action, count: int, before: Action | None = None, warm_up_s: float = 0.2) -> float:
    """Median µs of ``action`` by CUDA events around each of ``count`` calls, after a warm-up that raises the clocks.

    ``before`` runs outside the events. Calls are enqueued without waiting for each other.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < warm_up_s:
        action()
        torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, second in events:
        if before is not None:
            before()
        first.record()
        action()
        second.record()
    torch.cuda.synchronize()
    return 1000 * median(first.elapsed_time(second) for first, second in events)


def kernel_us(action: Action, count: int = 20, before: Action | None = None) -> list[tuple[str, float]]:
    """Name and median µs of each kernel of ``action``, in their order.

    Meaningful for kernels that do not overlap. Raises ``RuntimeError`` if calls differ in their kernels.
    """
    events = _profiled(action, 1)
    found = _profiled(lambda: (before and before(), action()), count)
    each = len(found) // count
    if not events or each < len(events) or each * count != len(found):
        raise RuntimeError(f"{len(found)} kernels in {count} calls, {len(events)} in one")
    skipped = each - len(events)  # those of ``before``
    kernels = []
    for place, (name, _) in enumerate(events, skipped):
        times = [found[call * each + place] for call in range(count)]
        if any(other != name for other, _ in times):
            raise RuntimeError(f"not every call has {name} in its place")
        kernels.append((name, median(us for _, us in times)))
    return kernels


def _profiled(action: Action, count: int) -> list[tuple[str, float]]:
    from torch.profiler import ProfilerActivity, profile

    action()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            action()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]
