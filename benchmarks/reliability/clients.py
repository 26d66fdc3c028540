"""Clients that check every answer, in closed and open loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from benchmarks.reliability.questions import Questions
from nezha_vllm.scrape import metrics_of

PATIENCE = 120.0  # seconds; a request that takes longer counts as a hang
CONNECTIONS = 1000  # a process; without a limit a server that falls behind would take all ports of the machine
FOR_VLLM = {"X-Session-ID": "vLLM's own handler answers"}  # and not the short way


@dataclass
class Tally:
    """What became of requests: by status, or by the error's name where there was none."""

    outcomes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)  # when, of those answered, by ``time.monotonic``
    answered: list[float] = field(default_factory=list)  # seconds each took
    refused: list[float] = field(default_factory=list)
    seconds: float = 0.0
    late: float = 0.0  # most that an open loop was behind its schedule
    most: int = 0  # requests of an open loop that waited for a reply at once

    @classmethod
    def of(cls, parts: Sequence[Tally]) -> Tally:
        """Of clients that asked at the same time."""
        found = cls(seconds=max(part.seconds for part in parts), late=max(part.late for part in parts))
        found.most = sum(part.most for part in parts)  # no fewer than all had at one moment
        for part in parts:
            found.outcomes += part.outcomes
            found.versions += part.versions
            for name in ("problems", "asked", "answered", "refused"):
                getattr(found, name).extend(getattr(part, name))
        return found

    @property
    def per_second(self) -> float:
        return len(self.answered) / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        text = f"{dict(sorted(self.outcomes.items()))}, {self.per_second:.1f} answers/s, {len(self.problems)} problems"
        for name, seconds in (("answered", self.answered), ("refused", self.refused)):
            if seconds:
                p50, p99, most = np.percentile(seconds, [50, 99, 100]) * 1e3
                text += f"; {name}: p50 {p50:.1f}, p99 {p99:.1f}, max {most:.0f} ms"
        return text


class Clients:
    """All clients of one server. To be used as a context, inside of an event loop.

    Args:
        seed: of prompts and moments.
        for_vllm: share of the requests that go to vLLM's own handler.
    """

    def __init__(
        self, url: str, questions: Questions, seed: int = 0, for_vllm: float = 0.0, path: str = "/v1/completions"
    ) -> None:
        self._url, self._questions, self._rng = url + path, questions, random.Random(seed)
        self._bodies = [questions.body(which) for which in range(len(questions.prompts))]
        self._for_vllm = for_vllm

    async def __aenter__(self) -> Clients:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, tally: Tally) -> bool:
        """One request, checked and counted; whether it was answered."""
        which = self._rng.randrange(len(self._bodies))
        headers = {"Content-Type": "application/json"}
        if self._for_vllm and self._rng.random() < self._for_vllm:
            headers |= FOR_VLLM
        begun = time.monotonic()
        try:
            async with self._session.post(self._url, data=self._bodies[which], headers=headers) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            tally.outcomes[type(error).__name__] += 1
            return False
        took = time.monotonic() - begun
        tally.outcomes[str(response.status)] += 1
        if response.status == 200:
            tally.asked.append(begun)
            tally.answered.append(took)
            version, problem = self._questions.check(which, content)
            tally.versions[version] += 1
        else:
            tally.refused.append(took)
            clear = response.status in (429, 503) and "Retry-After" in response.headers and b'"message"' in content
            problem = None if clear else f"status {response.status}: {content[:200]!r}"
        if problem is not None:
            tally.problems.append(problem)
        return response.status == 200

    async def closed_loop(self, clients: int, seconds: float) -> Tally:
        """Each client asks again when it has its answer."""
        tally, begun = Tally(), time.monotonic()

        async def client() -> None:
            while time.monotonic() < begun + seconds:
                await self.ask(tally)

        await asyncio.gather(*(client() for _ in range(clients)))
        tally.seconds = time.monotonic() - begun
        return tally

    async def open_loop(self, rate: float, seconds: float) -> tuple[Tally, float]:
        """So many new requests a second at random moments, whatever becomes of earlier ones.

        Also returns the ``time.monotonic()`` of the last one's begin; all have ended by then or later.
        """
        tally, begun, at = Tally(), time.monotonic(), 0.0
        under_way: set[asyncio.Task[bool]] = set()
        while (at := at + self._rng.expovariate(rate)) < seconds:
            wait = begun + at - time.monotonic()
            await asyncio.sleep(max(0.0, wait))
            tally.late = max(tally.late, -wait)
            task = asyncio.create_task(self.ask(tally))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            tally.most = max(tally.most, len(under_way))
        last, tally.seconds = time.monotonic(), time.monotonic() - begun
        await asyncio.gather(*under_way)
        return tally, last


def under_way(url: str) -> float:
    """Requests that the engines of a server work on or have waiting. Raises ``ScrapeError``."""
    scrape = metrics_of(url, timeout=30)
    return sum(scrape.total(f"vllm:num_requests_{state}") or 0.0 for state in ("running", "waiting"))
