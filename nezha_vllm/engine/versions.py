"""The generations of the catalogue that an engine process searches: one, and while a swap is under way two.

API processes drive a swap; vLLM brings their calls to every worker between steps. It has two phases, because a request
needs an API process and an engine that agree:

1. ``load`` reads the new generation in a thread, beside the old one. A process that has its own part of it calls
   ``hold``. If one cannot, it calls ``refuse``, and the generation is dropped everywhere.
2. When every API process holds it, none can refuse it any more, and each begins to send requests with its key. When
   the last request on the old one is answered in an API process, that calls ``release``; after the last of these calls
   the old generation is dropped.

So all processes go through the same generations, and a third is not begun while there are two. ``pending`` tells a
process that others are on their way to a generation that it did not see in the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from nezha_vllm.generation import FIRST, Generation

logger = logging.getLogger("vllm.nezha")

RETRY_SECONDS = 60.0  # behind a refusal, before the same generation is tried again
ACTIONS = ("pending", "load", "hold", "refuse", "release")
LOADING, LOADED, HELD, BUSY, REFUSED = "loading", "loaded", "held", "busy", "refused"

Reply = list  # a state and what belongs to it: vLLM sends lists and strings only


class Searchable(Protocol):
    def open(self) -> None:
        """Requests may need it from the next step on. Not called for the first."""

    def close(self) -> None:
        """No request will need it any more."""


Loaded = TypeVar("Loaded", bound=Searchable)


@dataclass
class _Entry(Generic[Loaded]):
    generation: Generation | None
    loaded: Loaded
    held: set[int] = field(default_factory=set)  # API processes, by number
    released: set[int] = field(default_factory=set)


class Versions(Generic[Loaded]):
    """To be called from one thread, the one that runs the steps.

    Args:
        first: what the server starts with.
        read: reads a generation, in a thread; may raise whatever it likes.
    """

    def __init__(self, first: Loaded, read: Callable[[Generation], Loaded]) -> None:
        self._entries = {FIRST: _Entry(None, first)}
        self._read = read
        self._reading: _Reading[Loaded] | None = None
        self._refusals: dict[str, tuple[str, float]] = {}  # reason, and until when

    def __iter__(self) -> Iterator[Loaded]:
        return (entry.loaded for entry in self._entries.values())

    def find(self, key: str) -> Loaded | None:
        """None for a generation that is gone: then nobody waits for the answer."""
        entry = self._entries.get(key)
        return None if entry is None else entry.loaded

    def call(self, action: str, *arguments: object) -> Reply:
        """What an API process asks for: one of ``ACTIONS``."""
        assert action in ACTIONS, action
        return getattr(self, action)(*arguments)

    def pending(self) -> Reply:
        """The newest generation here, read or being read; None for the first."""
        self._collect()
        newest = [*self._entries.values()][-1].generation
        if self._reading is not None:
            newest = None if self._reading.given_up else self._reading.generation
        return [LOADED, None if newest is None else list(newest)]

    def load(self, *fields: object) -> Reply:
        """Begin to read a generation, or tell how far it is. If another comes first, the reply says which."""
        wanted = Generation(*fields)  # type: ignore[arg-type]
        self._collect()
        if (reason := self._refused(wanted.key)) is not None:
            return [REFUSED, reason]
        if wanted.key in self._entries:
            return [LOADED]
        if self._reading is None and len(self._entries) == 1:
            self._reading = _Reading(wanted, self._read)
        if self._reading is not None:
            reading = self._reading.generation
            return [LOADING] if reading == wanted or self._reading.given_up else [BUSY, list(reading)]
        *_, newest = self._entries.values()
        assert newest.generation is not None, "two generations, and only the first has no pointer"
        return [BUSY, list(newest.generation)]

    def hold(self, key: str, client: int) -> Reply:
        """An API process has its own part of the generation. The reply has the number of those that do."""
        entry = self._entries.get(key)
        if entry is None:
            return [REFUSED, self._refused(key) or "it was given up"]
        entry.held.add(client)
        return [HELD, len(entry.held)]

    def refuse(self, key: str, reason: str) -> Reply:
        """An API process, or another engine, cannot take it up. Only before that process holds it."""
        self._refuse(key, reason)
        if self._reading is not None and self._reading.generation.key == key:
            self._reading.given_up = True
        if key in self._entries:
            self._drop(key)
        return [REFUSED, reason]

    def release(self, key: str, client: int, num_clients: int) -> Reply:
        """An API process has answered its last request on a generation."""
        if key in self._entries:
            released = self._entries[key].released
            released.add(client)
            if len(released) == num_clients:
                self._drop(key)
        return [LOADED]

    def _refuse(self, key: str, reason: str) -> None:
        self._refusals[key] = reason, time.monotonic() + RETRY_SECONDS

    def _refused(self, key: str) -> str | None:
        """Why it is, for now."""
        now = time.monotonic()
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if now < refusal[1]}
        return self._refusals[key][0] if key in self._refusals else None

    def _drop(self, key: str) -> None:
        self._entries.pop(key).loaded.close()

    def _collect(self) -> None:
        """Take what the thread has read."""
        reading = self._reading
        if reading is None or reading.thread.is_alive():
            return
        self._reading = None
        if reading.given_up:
            return
        if reading.loaded is None:
            self._refuse(reading.generation.key, reading.problem)
        else:
            reading.loaded.open()
            self._entries[reading.generation.key] = _Entry(reading.generation, reading.loaded)


class _Reading(Generic[Loaded]):
    def __init__(self, generation: Generation, read: Callable[[Generation], Loaded]) -> None:
        self.generation = generation
        self.loaded: Loaded | None = None
        self.problem = ""
        self.given_up = False  # refused while it is being read
        self.thread = threading.Thread(target=self._run, args=(read,), name="nezha-catalogue", daemon=True)
        self.thread.start()

    def _run(self, read: Callable[[Generation], Loaded]) -> None:
        try:
            self.loaded = read(self.generation)
        except Exception as error:  # whatever it is, the old generation serves on
            self.problem = str(error) or repr(error)
