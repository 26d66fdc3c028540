"""An API process follows its store: what is published or rolled back there is taken up between two requests.

`engine/versions.py` has the phases. Everything here that requests can see happens in the event loop in one go.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nezha_vllm.catalogue import Catalogue, CatalogueError
from nezha_vllm.engine.versions import BUSY, HELD, LOADING, REFUSED
from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.service import Service, replace_service
from nezha_vllm.generation import Generation
from nezha_vllm.item_index import index_bytes
from nezha_vllm.manifest import read_manifest
from nezha_vllm.memory import check_fits, give_back
from nezha_vllm.pointer import read_pointer

logger = logging.getLogger("vllm.nezha")

OVERTAKEN = "another generation came first"  # a reason that nobody needs to know
FIRST_WAIT, LONGEST_WAIT = 0.02, 0.25  # seconds between two looks at how far the others are
LONG_REQUESTS = 30.0  # seconds that they may hold up a swap before a line says so


@dataclass(frozen=True)
class Swap:
    """How the attempt to take up a generation ended; ``result`` is ``swapped`` or ``refused``."""

    result: str
    version: str | None
    serving: str
    sequence: int | None
    items: int | None
    seconds: float
    reason: str | None


class Refused(Exception):
    """A generation is not taken up, by any process; the message says why."""

    def __init__(self, generation: Generation, reason: str) -> None:
        super().__init__(reason)
        self.generation = generation


class Engines:
    """All workers of all engines that this API process sends requests to."""

    def __init__(self, core: Any, num_clients: int) -> None:
        self._core, self.client, self.num_clients = core, core.client_index, num_clients

    @property
    def dead(self) -> bool:
        return getattr(self._core.resources, "engine_dead", False)

    async def call(self, action: str, *arguments: Any) -> list[list[Any]]:
        """Replies of ``Versions.call``, one a worker."""
        call = ("collective_rpc", "nezha_catalogue", None, (action, *arguments), None)
        calls = [self._core._call_utility_async(*call, engine=engine) for engine in self._core.core_engines]
        return [reply for workers in await asyncio.gather(*calls) for reply in workers]


class Follower:
    """Takes up what the pointer shows, and tells of it.

    Args:
        engines: those that search.
        renderer: has the ``current`` service, which is replaced.
        model: by which the service is known in this process.
        told: called behind each swap and each refusal, once for a generation, with what this process serves then.
    """

    def __init__(self, engines: Engines, renderer: Any, model: str, told: Callable[[Swap, Service], None]) -> None:
        self._engines, self._renderer, self._model, self._told = engines, renderer, model, told
        self._settings = renderer.current.settings
        self._served: Generation | None = None  # None until the pointer has shown what it is
        self._refused: Generation | str | None = None  # the last one told of, or what was wrong with the pointer
        self._old: Callable[[], Service | None] = lambda: None
        self._held: tuple[str, Catalogue] | None = None  # key and items of what is held until all hold it
        self._hurried = False
        self._busy_since: float | None = None  # when a swap began to wait for requests; inf once told of

    async def run(self) -> None:
        """Until the engines are gone."""
        while True:
            await asyncio.sleep(self._settings.catalogue_poll_seconds)
            try:
                await self.look()
            except Exception as error:
                if self._engines.dead:
                    return
                logger.warning("NEZHA: following the catalogue store failed, it goes on: %r", error)

    async def look(self) -> None:
        """Go where the pointer shows, or where other processes are already going."""
        begun = time.monotonic()
        try:
            pointed = Generation.of(await asyncio.to_thread(read_pointer, self._settings.catalogue))
            served = self._serves(pointed)
            pending = self._others(await self._engines.call("pending"))
            if served and not pending:
                self._refused = self._busy_since = None
                return
            wanted = await self._loaded_by_engines(max(pending, default=pointed))
            if wanted is None:
                return
            self._busy_since = None
            catalogue = await self._held_by_all(wanted)
        except CatalogueError as problem:  # the pointer itself
            self._refuse(None, str(problem), begun)
        except Refused as refused:
            if self._held is not None and self._held[0] == refused.generation.key:
                self._held = None
            if str(refused) != OVERTAKEN:
                self._refuse(refused.generation, str(refused), begun)
        else:
            self._swap(wanted, catalogue, begun)

    def _serves(self, pointed: Generation) -> bool:
        if self._served is None and pointed.version == self._renderer.current.catalogue.version:
            self._served = pointed
        return self._served is not None and pointed[1:] == self._served[1:]

    def _others(self, replies: Sequence[Sequence[Any]]) -> set[Generation]:
        """The generations in replies, but for the one served here."""
        found = {Generation(*reply[1]) for reply in replies if reply[1:] and reply[1] is not None}
        return {generation for generation in found if generation.key != self._renderer.current.generation}

    async def _loaded_by_engines(self, wanted: Generation) -> Generation | None:
        """What all engines have read: ``wanted``, or one that comes before it; None to look again later."""
        async for _ in _waits():
            replies = await self._engines.call("load", *wanted)
            states = {reply[0] for reply in replies}
            if REFUSED in states:
                reason = next(reply[1] for reply in replies if reply[0] == REFUSED)
                if len(states) > 1:  # others can take it up, and are not to
                    await self._engines.call("refuse", wanted.key, reason)
                raise Refused(wanted, reason)
            busy = [reply for reply in replies if reply[0] == BUSY]
            others = self._others(busy)
            if busy and not others:
                self._hurry(wanted)
                return None  # requests on the generation before ours are still under way
            if len(busy) < len(replies):
                others.add(wanted)
            if others == {wanted}:
                if LOADING not in states:
                    return wanted
                continue
            wanted = max(others)
            for overtaken in others - {wanted}:  # engines have begun with different ones
                await self._engines.call("refuse", overtaken.key, OVERTAKEN)
        raise AssertionError("waiting has no end")

    async def _held_by_all(self, wanted: Generation) -> Catalogue:
        """The items, once every API process has them."""
        if self._held is None or self._held[0] != wanted.key:
            self._held = None
            self._held = wanted.key, await self._read(wanted)
        async for _ in _waits():
            replies = await self._engines.call("hold", wanted.key, self._engines.client)
            if any(reply[0] == REFUSED for reply in replies):
                raise Refused(wanted, next(reply[1] for reply in replies if reply[0] == REFUSED))
            if replies == [[HELD, self._engines.num_clients]] * len(replies):
                catalogue, self._held = self._held[1], None
                return catalogue
        raise AssertionError("waiting has no end")

    async def _read(self, wanted: Generation) -> Catalogue:
        """The items of a generation that this process has not held yet: it may still refuse it."""
        store = self._settings.catalogue
        try:
            catalogue = await asyncio.to_thread(read_items, store, wanted, self._engines.num_clients)
            reason = None
        except Exception as error:
            reason = str(error) or repr(error)
        with suppress(CatalogueError):  # a pointer damaged meanwhile takes nothing back
            if reason is None and self._serves(Generation.of(await asyncio.to_thread(read_pointer, store))):
                reason = OVERTAKEN  # taken back while it was being read
        if reason is not None:
            await self._engines.call("refuse", wanted.key, reason)
            raise Refused(wanted, reason)
        return catalogue

    def _hurry(self, wanted: Generation) -> None:
        """Where the service before lives on at the second look, look for it among what waits to be collected."""
        if self._old() is not None and self._hurried:
            gc.collect()
        self._hurried = self._old() is not None
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > LONG_REQUESTS:
            place = "this API process" if self._hurried else "another API process"
            waits = f"catalogue version {wanted.version} has waited for {LONG_REQUESTS:.0f} s"
            logger.warning("NEZHA: %s: requests on the version before are still under way in %s", waits, place)
            self._busy_since = math.inf

    def _swap(self, wanted: Generation, catalogue: Catalogue, begun: float) -> None:
        old: Service = self._renderer.current
        loop, key = asyncio.get_running_loop(), old.generation

        def release() -> None:
            _keep(loop.create_task(self._release(key)))
            loop.run_in_executor(None, give_back)

        # plans of requests are what keeps a service alive; the last may be gone in any thread
        weakref.finalize(old, _call_soon, loop, release).atexit = False
        self._old = weakref.ref(old)
        self._renderer.current = old.with_catalogue(catalogue, wanted.key)
        replace_service(self._model, self._renderer.current)
        self._served, self._refused = wanted, None
        seconds = time.monotonic() - begun
        swap = Swap("swapped", wanted.version, wanted.version, wanted.sequence, catalogue.num_items, seconds, None)
        self._told(swap, self._renderer.current)

    async def _release(self, key: str) -> None:
        """Until it is done: no later generation begins before."""
        while not self._engines.dead:
            try:
                await self._engines.call("release", key, self._engines.client, self._engines.num_clients)
                return
            except Exception as error:
                logger.warning(
                    "NEZHA: the engines do not know yet that a catalogue can go, it is told again: %r", error
                )
                await asyncio.sleep(self._settings.catalogue_poll_seconds)

    def _refuse(self, wanted: Generation | None, reason: str, begun: float) -> None:
        if self._refused == (wanted or reason):
            return
        self._refused = wanted or reason
        service = self._renderer.current
        version, sequence = (wanted.version, wanted.sequence) if wanted else (None, None)
        seconds = time.monotonic() - begun
        self._told(Swap("refused", version, service.catalogue.version, sequence, None, seconds, reason), service)


def read_items(store: Path, generation: Generation, processes: int) -> Catalogue:
    """Items of a generation, while those of another are served; ``processes`` do so at the same time.

    Raises ``CatalogueError``.
    """
    folder = generation.folder(store)
    check_fits(processes * api_bytes(read_manifest(folder)), f"catalogue version {generation.version}")
    catalogue = Catalogue.load(folder)
    catalogue.rows([])  # makes the index
    give_back()
    return catalogue


def api_bytes(manifest: dict[str, Any]) -> int:
    """Of an API process while it reads: arrays, what they are checked with, and the index.

    Measured at 3 levels: 98 bytes an item and the index.
    """
    levels, items = len(manifest["codebook_sizes"]), manifest["num_items"]
    return (56 + 16 * levels) * items + index_bytes(items)


def tell(swap: Swap, service: Service, first: bool) -> None:
    """In every API process; they all come to the same end, and the ``first`` of them counts it and writes a line."""
    counted = metrics.active()
    if counted is not None:
        if swap.result == "swapped":  # else the pointer tells the time of a version that is not served
            counted.show_catalogue(service)
        if first:
            counted.count_swap(swap.result)
    if first:
        level = logging.INFO if swap.result == "swapped" else logging.ERROR
        facts = {name: value for name, value in asdict(swap).items() if value is not None}
        facts["seconds"] = round(swap.seconds, 3)
        logger.log(level, "NEZHA: catalogue %s", json.dumps(facts))


def follow(engine: Any) -> None:
    """Begin to follow, once for each ``AsyncLLM``, where the settings ask for it; needs a running event loop."""
    current = getattr(engine.renderer, "current", None)
    if not isinstance(current, Service) or not current.settings.follows or hasattr(engine, "nezha_follower"):
        return
    parallel = engine.vllm_config.parallel_config
    engines = Engines(engine.engine_core, parallel._api_process_count)
    told = partial(tell, first=engines.client == 0)
    follower = Follower(engines, engine.renderer, engine.model_config.model, told)
    engine.nezha_follower = asyncio.get_running_loop().create_task(follower.run())


async def _waits() -> Any:
    wait = FIRST_WAIT
    while True:
        yield wait
        await asyncio.sleep(wait)
        wait = min(LONGEST_WAIT, 2 * wait)


_TASKS: set[asyncio.Task[Any]] = set()


def _keep(task: asyncio.Task[Any]) -> None:
    """The event loop alone would not keep it alive."""
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
