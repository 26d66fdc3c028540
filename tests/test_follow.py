"""API processes and engines take up a store's versions together, whatever fails and whoever sees what first."""

from __future__ import annotations

import asyncio
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from generations import Loaded

from nezha_vllm.catalogue import Catalogue, load_keys
from nezha_vllm.engine import versions as engine_versions
from nezha_vllm.engine.versions import Versions
from nezha_vllm.frontend import follow, install
from nezha_vllm.frontend.follow import Follower, Swap
from nezha_vllm.frontend.service import Service, end_request, one_request, service_for_request
from nezha_vllm.generation import Generation
from nezha_vllm.store import Store

SIZES = [4, 8]


def test_a_request_keeps_the_service_it_began_with(catalogues: dict[str, Catalogue]) -> None:
    before, after = service(catalogues["a"], Path()), service(catalogues["b"], Path())

    async def request() -> list[Service]:
        with one_request():
            found = [service_for_request(before)]
            later = asyncio.create_task(asyncio.sleep(0, result=None))
            found.append(service_for_request(after))
            await later

            async def part() -> Service:
                return service_for_request(after)

            found.append(await asyncio.create_task(part()))
        return [*found, service_for_request(after)]

    assert asyncio.run(request()) == [before, before, before, after]


def test_a_request_inside_of_another_is_part_of_it_until_that_has_ended(catalogues: dict[str, Catalogue]) -> None:
    before, after = service(catalogues["a"], Path()), service(catalogues["b"], Path())
    with one_request():
        assert service_for_request(before) is before
        with one_request():
            assert service_for_request(after) is before
        assert service_for_request(after) is before
        gone = weakref.ref(before)
        end_request()
        del before
        assert gone() is None, "nothing keeps a service alive for the time that an answer is read"
        with one_request():
            assert service_for_request(after) is after


def test_a_request_by_another_route_is_one_request_too(
    catalogues: dict[str, Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's handler is called, and no route of ours."""
    before, after = service(catalogues["a"], Path()), service(catalogues["b"], Path())
    monkeypatch.setattr(install, "service_of", lambda _: before)
    monkeypatch.setattr("nezha_vllm.frontend.completions.prepare", lambda request, _: request)
    monkeypatch.setattr("nezha_vllm.frontend.options.make_plan", lambda *_: None)

    async def render(handler: Any, request: Any, raw_request: Any) -> Service:
        return service_for_request(after)

    handler, request = (
        SimpleNamespace(model_config=None),
        SimpleNamespace(prompt="", to_sampling_params=lambda *_: None),
    )
    assert asyncio.run(install._create_completion(render)(handler, request)) is before


def test_requests_that_hold_up_a_swap_are_told_of_once(
    catalogues: dict[str, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "LONG_REQUESTS", 0.02)
    store = Store(tmp_path / "store")
    engine = Versions(Loaded("a"), lambda wanted: Loaded(wanted.version))

    async def run() -> list[str]:
        renderer = SimpleNamespace(current=service(catalogues["a"], store.folder))
        follower = Follower(Alone(engine), renderer, "model", lambda *_: None)
        request = renderer.current
        for name in "ab":
            catalogues[name].save(tmp_path / name)
            store.publish(tmp_path / name, force=True)
            await follower.look()
        assert renderer.current.catalogue.version == "b"
        store.rollback()
        for _ in range(4):
            await follower.look()
            await asyncio.sleep(0.01)
        assert renderer.current.catalogue.version == "b"
        del request
        await asyncio.sleep(0.01)
        await follower.look()
        return [renderer.current.catalogue.version]

    assert asyncio.run(run()) == ["a"]
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "version a has waited" in line
    assert "this API process" in line


def follower_of(catalogues: dict[str, Catalogue], folder: Path, engine: Any) -> tuple[Store, SimpleNamespace, Follower]:
    """On a store whose first version, a, it serves."""
    store = Store(folder / "store")
    for name in "abc":
        catalogues[name].save(folder / name)
    store.publish(folder / "a")
    renderer = SimpleNamespace(current=service(catalogues["a"], store.folder))
    return store, renderer, Follower(engine, renderer, "model", lambda *_: None)


def test_a_rollback_stops_the_version_it_takes_back_while_that_is_being_read(
    catalogues: dict[str, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Versions(Loaded("a"), lambda wanted: Loaded(wanted.version))
    store, renderer, follower = follower_of(catalogues, tmp_path, Alone(engine))

    def read_items(folder: Path, wanted: Generation, processes: int) -> Catalogue:
        store.rollback()
        return catalogues["b"]

    async def run() -> None:
        await follower.look()
        store.publish(tmp_path / "b", force=True)
        monkeypatch.setattr(follow, "read_items", read_items)
        await follower.look()

    asyncio.run(run())
    assert renderer.current.catalogue.version == "a"
    assert [loaded.version for loaded in engine] == ["a"]


def test_what_a_process_holds_it_refuses_no_more(
    catalogues: dict[str, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call to the engines fails behind the reading; others may answer by the new version already."""

    class Failing(Alone):
        async def call(self, action: str, *arguments: Any) -> list[list[Any]]:
            replies = await super().call(action, *arguments)
            if action == "hold" and held.append(arguments) is None and len(held) == 1:
                raise TimeoutError
            return replies

    held: list[Any] = []
    engine = Versions(Loaded("a"), lambda wanted: Loaded(wanted.version))
    store, renderer, follower = follower_of(catalogues, tmp_path, Failing(engine))

    async def run() -> None:
        await follower.look()
        store.publish(tmp_path / "b", force=True)
        with pytest.raises(TimeoutError):
            await follower.look()
        monkeypatch.setattr(follow, "read_items", None)  # as if there were no memory any more
        await follower.look()

    asyncio.run(run())
    assert renderer.current.catalogue.version == "b"
    assert len(held) == 2


def test_an_engine_is_told_until_it_knows_that_a_generation_can_go(
    catalogues: dict[str, Catalogue], tmp_path: Path
) -> None:
    class Deaf(Alone):
        async def call(self, action: str, *arguments: Any) -> list[list[Any]]:
            if action == "release" and told.append(arguments) is None and len(told) < 3:
                raise TimeoutError
            return await super().call(action, *arguments)

    told: list[Any] = []
    engine = Versions(Loaded("a"), lambda wanted: Loaded(wanted.version))
    store, _, follower = follower_of(catalogues, tmp_path, Deaf(engine))

    async def run() -> None:
        for name in "bc":
            await follower.look()
            store.publish(tmp_path / name, force=True)
            await follower.look()
            await asyncio.sleep(0.02)

    asyncio.run(run())
    assert len(told) == 4
    assert [loaded.version for loaded in engine] == ["c"]


@pytest.fixture(scope="module")
def catalogues() -> dict[str, Catalogue]:
    rng, found = np.random.default_rng(0), {}
    for name in "abcdef":
        codes = np.stack([rng.integers(0, size, 9) for size in SIZES], axis=1)
        found[name] = Catalogue.build([f"{name}{number}" for number in range(9)], codes, SIZES, version=name)
    return found


def service(catalogue: Catalogue, store: Path) -> Service:
    settings: Any = SimpleNamespace(catalogue=store, catalogue_poll_seconds=0.001)
    return Service(settings, catalogue, (0, 4), (12, 13), 20, 64)


class Connection:
    """An API process's way to the engines: each gets its calls at a time of its own."""

    num_clients, dead = 3, False

    def __init__(self, client: int, engines: list[Versions], rng: random.Random) -> None:
        self.client, self.engines, self.rng = client, engines, rng

    async def call(self, action: str, *arguments: Any) -> list[list[Any]]:
        async def one(engine: Versions) -> list[Any]:
            await asyncio.sleep(self.rng.random() * 0.002)
            return engine.call(action, *arguments)

        return await asyncio.gather(*map(one, self.engines))


class Alone:
    """The way of the only API process to the only engine."""

    client, num_clients, dead = 0, 1, False

    def __init__(self, engine: Versions) -> None:
        self.engine = engine

    async def call(self, action: str, *arguments: Any) -> list[list[Any]]:
        return [self.engine.call(action, *arguments)]


@pytest.mark.parametrize("seed", range(2))
def test_processes_agree_whatever_is_published_pruned_refused_or_taken_back(
    catalogues: dict[str, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Three API processes, two engines, requests all the time, and two versions kept in a store that changes fast."""
    monkeypatch.setattr(engine_versions, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(follow, "FIRST_WAIT", 0.001)
    rng, failing, told = random.Random(seed), [True], []
    for name, catalogue in catalogues.items():
        catalogue.save(tmp_path / name)
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "a")

    def read(wanted: Generation) -> Loaded:
        if failing[0] and rng.random() < 0.15:
            raise MemoryError("engine")
        return Loaded(load_keys(wanted.folder(store.folder)).version)

    def read_items(folder: Path, wanted: Generation, processes: int) -> Catalogue:
        if failing[0] and rng.random() < 0.15:
            raise MemoryError("api")
        return Catalogue.load(wanted.folder(folder))

    monkeypatch.setattr(follow, "read_items", read_items)
    engines = [Versions(Loaded("a"), read) for _ in range(2)]
    served: set[str] = set()

    async def requests(renderer: Any) -> None:
        while True:
            with one_request():
                asked = service_for_request(renderer.current)
                await asyncio.sleep(rng.random() * 0.01)
                found = rng.choice(engines).find(asked.generation)
                assert found is not None, "an API process is ahead of an engine, or an engine forgot too early"
                assert found.version == asked.catalogue.version
                assert not found.closed
                served.add(found.version)
                del asked

    async def run() -> None:
        renderers = [SimpleNamespace(current=service(catalogues["a"], store.folder)) for _ in range(3)]
        followers = [
            Follower(Connection(client, engines, rng), renderer, f"model-{client}", lambda swap, _: told.append(swap))
            for client, renderer in enumerate(renderers)
        ]
        running = [asyncio.create_task(follower.run()) for follower in followers]
        clients = [asyncio.create_task(requests(renderer)) for renderer in renderers for _ in range(2)]
        step = -1
        # on a busy machine a version may be gone before anybody served it
        while (step := step + 1) < 60 or (len(served) < 4 and step < 600):
            await asyncio.sleep(rng.random() * 0.02)
            assert all(len(list(engine)) <= 2 for engine in engines)
            if step % 4 == 3 and store.pointer().previous:
                store.rollback()
            else:
                store.publish(tmp_path / rng.choice("abcdef"), force=True, keep=1)
        failing[0] = False
        wanted = store.pointer().version
        for _ in range(1000):
            await asyncio.sleep(0.01)
            only = all([loaded.version for loaded in engine] == [wanted] for engine in engines)
            if only and all(renderer.current.catalogue.version == wanted for renderer in renderers):
                break
        assert [renderer.current.catalogue.version for renderer in renderers] == [wanted] * 3
        assert [[loaded.version for loaded in engine] for engine in engines] == [[wanted]] * 2
        assert not any(client.done() for client in clients), [client for client in clients if client.done()]
        for task in [*running, *clients]:
            task.cancel()

    asyncio.run(run())
    assert len(served) > 3
    assert {swap.result for swap in told} == {"swapped", "refused"}
    assert all(isinstance(swap, Swap) for swap in told)
