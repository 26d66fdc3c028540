"""One server as a queueing model: API processes in front of an engine that answers whatever waits in one step.

Times are milliseconds. A step takes ``step_ms`` and ``request_ms`` for each request in it; requests that arrive
meanwhile wait for the next one, or for the one behind it where steps overlap: with asynchronous scheduling, the
requests of a step are chosen when the one before it begins. An API process is one core: it works on a request before
the engine and after it, one thing at a time, for times of a gamma distribution, and once a second in the mean it
pauses, as Python does to collect garbage: a client that reads answers in Python counts with it. Which API process gets
an arrival is chance, as it is with connections that are opened at random.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

PAUSE_EVERY_MS = 1000.0  # in the mean, between two pauses of an API process
BEFORE = 0.4  # share of an API process's work that comes before the engine
WORK_SHAPE = 2.0  # of its times: 1 would be exponential, which makes the tail of a few clients too long by a fifth


@dataclass(frozen=True)
class ServerModel:
    """``rest_ms`` is what no process of the server works on: the network, the client, waking up.

    ``api_ms`` is a mean. That this work varies makes the tail of few clients.
    """

    step_ms: float
    request_ms: float
    api_ms: float
    rest_ms: float
    pause_ms: float
    max_requests: int
    api_processes: int
    overlapping: bool = False

    def most_requests_per_s(self) -> float:
        """Requests/s above which a queue grows without end."""
        step = self.step_ms / self.max_requests + self.request_ms
        return 1000 / max(step, self.api_ms / self.api_processes)


class _Server:
    """Arrivals in, latencies out. ``more_ms`` is what a request adds to its step beyond ``request_ms``.

    ``answered`` hears, when a request's step ends, of its API process, the time until the client has the answer, and
    the latency that will then have been.
    """

    def __init__(
        self, environment: Any, model: ServerModel, seed: int, answered: Callable[[int, float, float], None]
    ) -> None:
        self.environment, self.model, self.answered = environment, model, answered
        self.waiting: deque[tuple[float, int, float]] = deque()
        self.free_at = [0.0] * model.api_processes
        self.chance, self.work_chance = (np.random.default_rng((seed, stream)) for stream in (1, 2))
        self.pauses_at = self.chance.exponential(PAUSE_EVERY_MS, model.api_processes).tolist()
        self.work = environment.event()
        environment.process(self._engine())

    def receive(self, process: int, more_ms: float = 0.0) -> None:
        started = self.environment.now
        self.after(self._occupy(process, BEFORE), lambda: self._wait((started, process, more_ms)))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.environment.timeout(delay).callbacks.append(lambda event: action())

    def _occupy(self, process: int, share: float) -> float:
        """Time from now until an API process has done its part of a request."""
        begins = max(self.free_at[process], self.environment.now)
        while self.pauses_at[process] <= begins:
            begins = max(begins, self.pauses_at[process] + self.model.pause_ms)
            self.pauses_at[process] += self.model.pause_ms + self.chance.exponential(PAUSE_EVERY_MS)
        self.free_at[process] = begins + share * self.model.api_ms * self.work_chance.gamma(WORK_SHAPE) / WORK_SHAPE
        return self.free_at[process] - self.environment.now

    def _wait(self, request: tuple[float, int, float]) -> None:
        self.waiting.append(request)
        if not self.work.triggered:
            self.work.succeed()

    def _engine(self) -> Generator[Any, Any, None]:
        model, free_at = self.model, 0.0
        under_way: deque[tuple[float, list[tuple[float, int, float]]]] = deque()  # steps, and when they end
        while True:
            if not self.waiting and not under_way:
                self.work = self.environment.event()
                yield self.work
            if self.waiting and len(under_way) <= model.overlapping:
                step = [self.waiting.popleft() for _ in range(min(len(self.waiting), model.max_requests))]
                more = sum(more for _, _, more in step)
                free_at = max(free_at, self.environment.now) + model.step_ms + len(step) * model.request_ms + more
                under_way.append((free_at, step))
                continue
            ends, step = under_way.popleft()
            yield self.environment.timeout(max(0.0, ends - self.environment.now))
            for started, process, _ in step:
                behind = self._occupy(process, 1 - BEFORE) + model.rest_ms
                self.answered(process, behind, self.environment.now + behind - started)


def open_loop(
    model: ServerModel, rate: float, requests: int, seed: int = 0, more_ms: np.ndarray | None = None
) -> np.ndarray:
    """Latencies of Poisson arrivals at ``rate`` a second, each over a connection of its own, from an idle server on.

    ``more_ms`` are values to draw each request's extra time in a step from.
    """
    import simpy

    generator = np.random.default_rng(seed)
    environment = simpy.Environment()
    latencies: list[float] = []
    server = _Server(environment, model, seed, lambda process, behind, latency: latencies.append(latency))
    gaps = generator.exponential(1000 / rate, requests)
    processes = generator.integers(model.api_processes, size=requests)
    more = np.zeros(requests) if more_ms is None else generator.choice(more_ms, requests)

    def arrive() -> Generator[Any, Any, None]:
        for gap, process, extra in zip(gaps.tolist(), processes.tolist(), more.tolist(), strict=True):
            yield environment.timeout(gap)
            server.receive(process, extra)

    environment.process(arrive())
    environment.run()
    return np.array(latencies)


def closed_loop(model: ServerModel, clients: int, requests: int, seed: int = 0, pause_ms: float = 0.0) -> np.ndarray:
    """Latencies of clients each of whom sends a request only when it has the answer to its last.

    In front of each it pauses for an exponential time of mean ``pause_ms``. Without pauses the first answers, all of
    which were asked for at once, are left out. A client keeps its connection, and so its API process, which is the one
    that chance gave it.
    """
    import simpy

    generator = np.random.default_rng(seed)
    environment = simpy.Environment()
    latencies: list[float] = []
    done = environment.event()
    first = 0 if pause_ms else 4 * clients

    def ask(process: int, behind: float = 0.0) -> None:
        pause = generator.exponential(pause_ms) if pause_ms else 0.0
        server.after(behind + pause, lambda: server.receive(process))

    def answered(process: int, behind: float, latency: float) -> None:
        latencies.append(latency)
        if len(latencies) == first + requests:
            done.succeed()
        ask(process, behind)

    server = _Server(environment, model, seed, answered)
    for process in generator.integers(model.api_processes, size=clients).tolist():
        ask(process)
    environment.run(until=done)
    return np.array(list(islice(latencies, first, None)))
