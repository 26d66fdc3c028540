"""How long the draft stage takes, without waiting for it."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nezha_vllm import payload

IN_FLIGHT = 8  # steps whose time may be unread; vLLM runs at most two ahead


class StageClock:
    """Measures what is enqueued inside its ``with`` block; ``seconds`` is the time of the latest run that has ended.

    On a CPU that is the run just left. A GPU runs behind the host: there the time lies between two events, which are
    read when a later run begins, so ``seconds`` is an earlier run's, and 0 before there was one.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.seconds = 0.0
        self._on_gpu = on_gpu
        self._started = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=IN_FLIGHT)

    def __enter__(self) -> None:
        if not self._on_gpu:
            self._started = time.perf_counter()
            return
        while self._events and self._events[0][1].query():
            self.seconds = seconds_between(*self._events.popleft())
        self._events.append((recorded_event(), torch.cuda.Event(enable_timing=True)))

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self.seconds = time.perf_counter() - self._started


def timed(search: Callable[..., payload.Payload]) -> Callable[..., payload.Payload]:
    """Method of a stage with a ``clock``: its payload also says how long it took."""

    @functools.wraps(search)
    def timed_search(stage: Any, states: torch.Tensor, searches: Sequence[Any]) -> payload.Payload:
        if not any(searches):  # a step that answers nobody
            return search(stage, states, searches)
        with stage.clock:
            found = search(stage, states, searches)
        return payload.with_seconds(found, stage.clock.seconds)

    return timed_search


def recorded_event() -> torch.cuda.Event:
    """An event at the end of what the current stream has been given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Of two events that the GPU has passed."""
    return start.elapsed_time(end) / 1000
