"""Clients in several processes: one sends and checks about a thousand requests a second, a GPU answers more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, TypeVar

from benchmarks.reliability.clients import Clients, Tally
from benchmarks.reliability.questions import Questions

LONGEST_RECOVERY = 120.0  # seconds
T = TypeVar("T")


class Crowd:
    """`Clients` of one server, spread over processes that begin at the same moment. To be used as a context."""

    def __init__(self, url: str, questions: Questions, processes: int, for_vllm: float = 0.0) -> None:
        self._asked, self._count, self._for_vllm = (url, questions), processes, for_vllm
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        self._seed = 0

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def closed_loop(self, clients: int, seconds: float) -> Tally:
        shares = [len(range(place, clients, self._count)) for place in range(min(clients, self._count))]
        return Tally.of(self._all(_closed_loop, [(share, seconds) for share in shares]))

    def open_loop(self, rate: float, seconds: float) -> tuple[Tally, float]:
        """Also returns when the last request began."""
        found = self._all(_open_loop, [(rate / self._count, seconds)] * self._count)
        return Tally.of([tally for tally, _ in found]), max(last for _, last in found)

    def recovery(self, usual: float, since: float) -> float:
        """Seconds from ``since`` until one request alone takes no longer than ``usual`` again; inf if it never does."""
        [seconds] = self._all(_recovery, [(usual, since)])
        return seconds

    def _all(self, loop: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        parts: list[Future[T]] = []
        for values in arguments:
            self._seed += 1
            parts.append(self._pool.submit(loop, *self._asked, self._seed, self._for_vllm, *values))
        return [part.result() for part in parts]


def _closed_loop(url: str, questions: Questions, seed: int, for_vllm: float, clients: int, seconds: float) -> Tally:
    async def loop() -> Tally:
        async with Clients(url, questions, seed, for_vllm) as asking:
            return await asking.closed_loop(clients, seconds)

    return asyncio.run(loop())


def _open_loop(
    url: str, questions: Questions, seed: int, for_vllm: float, rate: float, seconds: float
) -> tuple[Tally, float]:
    async def loop() -> tuple[Tally, float]:
        async with Clients(url, questions, seed, for_vllm) as asking:
            return await asking.open_loop(rate, seconds)

    return asyncio.run(loop())


def _recovery(url: str, questions: Questions, seed: int, for_vllm: float, usual: float, since: float) -> float:
    async def loop() -> float:
        async with Clients(url, questions, seed, for_vllm) as asking:
            while time.monotonic() < since + LONGEST_RECOVERY:
                tally, begun = Tally(), time.monotonic()
                if await asking.ask(tally) and tally.answered[0] <= usual:
                    return max(0.0, begun - since)
                await asyncio.sleep(0.05)
            return math.inf

    return asyncio.run(loop())
