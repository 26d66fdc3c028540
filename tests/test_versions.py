"""Engines and API processes take up a store's versions together, whatever fails and whoever sees what first."""

from __future__ import annotations

import asyncio
import random
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine import FinishReason

from nezha_vllm import payload
from nezha_vllm.beam import BeamSearch
from nezha_vllm.catalogue import Catalogue, CatalogueError, Keys, load_keys
from nezha_vllm.draft_head import DraftHead
from nezha_vllm.engine import versions as engine_versions
from nezha_vllm.engine.draft_stage import DraftStage, Search
from nezha_vllm.engine.searched import Searched
from nezha_vllm.engine.stage_clock import StageClock
from nezha_vllm.engine.versions import BUSY, HELD, LOADED, LOADING, REFUSED, Versions
from nezha_vllm.frontend import follow, install
from nezha_vllm.frontend.answers import NezhaRequestState, _PayloadSink
from nezha_vllm.frontend.follow import Follower, Swap
from nezha_vllm.frontend.service import Service, end_request, one_request, service_for_request
from nezha_vllm.generation import FIRST, Generation
from nezha_vllm.memory import available_bytes, check_fits
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.store import Store

SIZES = [4, 8]


@dataclass
class Loaded:
    version: str
    closed: bool = False

    def open(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


def generation(sequence: int) -> Generation:
    return Generation(sequence, f"v{sequence}", f"{sequence:064}")


def wait_for(versions: Versions, wanted: Generation) -> list[Any]:
    while (reply := versions.call("load", *wanted)) == [LOADING]:
        versions._reading.thread.join()
    return reply


def test_a_third_generation_waits_until_the_first_is_released_by_all() -> None:
    first = Loaded("first")
    versions = Versions(first, lambda wanted: Loaded(wanted.version))
    two, three = generation(2), generation(3)
    assert wait_for(versions, two) == [LOADED]
    assert [versions.call("hold", two.key, client) for client in (0, 1, 1)] == [[HELD, 1], [HELD, 2], [HELD, 2]]
    assert versions.call("load", *three) == [BUSY, list(two)]
    versions.call("release", FIRST, 0, 2)
    assert versions.find(FIRST) is first
    versions.call("release", FIRST, 1, 2)
    assert first.closed
    assert versions.find(FIRST) is None
    assert wait_for(versions, three) == [LOADED]


def test_what_is_being_read_comes_before_what_was_published_behind_it() -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    two, three = generation(2), generation(3)
    versions.call("load", *two)
    assert versions.call("load", *three) in ([BUSY, list(two)], [LOADING])
    assert wait_for(versions, two) == [LOADED]
    assert versions.call("load", *three) == [BUSY, list(two)]


def test_a_refusal_drops_the_generation_everywhere_and_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    two = generation(2)
    wait_for(versions, two)
    versions.call("hold", two.key, 0)
    versions.call("refuse", two.key, "no memory")
    assert versions.find(two.key) is None
    assert versions.call("hold", two.key, 0) == [REFUSED, "no memory"]
    assert versions.call("load", *two) == [REFUSED, "no memory"]
    monkeypatch.setattr(engine_versions.time, "monotonic", lambda: 1e12)
    assert wait_for(versions, two) == [LOADED]


def test_each_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(Loaded("first"), lambda wanted: Loaded(wanted.version))
    for wanted in (generation(2), generation(3)):
        versions.call("refuse", wanted.key, wanted.version)
    assert versions.call("load", *generation(2)) == [REFUSED, "v2"]
    assert versions.call("load", *generation(3)) == [REFUSED, "v3"]


def test_what_cannot_be_read_is_refused_with_the_reason() -> None:
    def fail(wanted: Generation) -> Loaded:
        raise CatalogueError("keys.safetensors is damaged")

    versions = Versions(Loaded("first"), fail)
    assert wait_for(versions, generation(2)) == [REFUSED, "keys.safetensors is damaged"]
    assert [loaded.version for loaded in versions] == ["first"]


def test_memory_that_is_not_there_refuses_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nezha_vllm.memory.available_bytes", lambda device: 1 << 30)
    check_fits(700 << 20, "version x")
    with pytest.raises(CatalogueError, match=r"version x needs 800 MiB .* 1024 MiB are available"):
        check_fits(800 << 20, "version x")


LIMITS = {
    "version 2": {"memory.max": "900", "memory.current": "800", "memory.stat": "inactive_file 30\nactive_file 20"},
    "no limit": {"memory.max": "max", "memory.current": "800", "memory.stat": "active_file 20"},
    "version 1": {
        "memory/memory.limit_in_bytes": "900",
        "memory/memory.usage_in_bytes": "800",
        "memory/memory.stat": "active_file 1\ntotal_inactive_file 30\ntotal_active_file 20",
    },
    "no container": {},
}


@pytest.mark.parametrize(("case", "left"), zip(LIMITS, [150, 1000, 150, 1000], strict=True))
def test_a_containers_limit_counts_without_the_pages_of_files(
    case: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LIMITS[case].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("nezha_vllm.memory.CGROUP", tmp_path)
    machine = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert available_bytes() == left


def test_requests_of_two_generations_in_one_step_are_searched_each_in_its_own() -> None:
    torch.manual_seed(0)
    head = DraftHead(16, (8, 8, 8)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_()
    codec, rng = SemanticIdCodec((8, 8, 8)), np.random.default_rng(0)
    first, second = (np.sort(rng.choice(512, count, replace=False)) for count in (40, 300))
    search = BeamSearch(head, torch.from_numpy(first))
    one = Searched(search, Keys(codec, "one", first, None, None))
    two = Searched(search.over(torch.from_numpy(second)), Keys(codec, "two", second, None, None))
    stage: Any = DraftStage.__new__(DraftStage)
    stage.num_states, stage.graphs, stage.clock = 4, None, StageClock(on_gpu=False)
    stage.versions = Versions(one, lambda _: two)
    wanted = generation(2)
    wait_for(stage.versions, wanted)

    states = torch.randn(6, 4, 16)
    asked = [FIRST, wanted.key, None, "gone", wanted.key, FIRST]
    widths = [5, 20, 0, 7, 9, 30]
    searches = [
        None if key is None else Search(5, width, True, generation=key)
        for key, width in zip(asked, widths, strict=True)
    ]
    together = stage(states.flatten(0, 1), searches)
    for row, key in enumerate(asked):
        if key in (None, "gone"):
            assert (together.token_ids[row, 1:] == -1).all(), "nobody gets what nobody asked for"
            assert together.token_ids[row, 0] == (0 if key is None else payload.GONE)
            continue
        alone = stage(states[row], [searches[row]])
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()
        assert torch.allclose(together.log_probs[row], alone.log_probs[0])
        keys = torch.from_numpy(first if key == FIRST else second)
        reference = BeamSearch(head, keys)(states[row : row + 1], [widths[row]], [True])
        assert together.token_ids[row, 1:].tolist() == reference.index_NK[0, :5].tolist()

    only = stage(states[:1].flatten(0, 1), [Search(5, 5, True, generation="gone")])
    assert only.token_ids[0, 0] == payload.GONE


def test_a_request_on_a_generation_that_is_gone_is_told_to_come_again() -> None:
    state, sink = NezhaRequestState.__new__(NezhaRequestState), _PayloadSink()
    service = SimpleNamespace(num_levels=3, catalogue=SimpleNamespace(version="monday"))
    state.plan, state.logprobs_processor = SimpleNamespace(service=service), sink  # type: ignore[assignment]
    empty = payload.with_gone(payload.empty(1, torch.device("cpu")), [0])
    sink.payload = [part.numpy() for part in empty]
    error = state.make_request_output([0], None, FinishReason.LENGTH)
    assert create_error_response(error).error.code == 503
    assert "monday is gone from the engine" in str(error)


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
    """As by /invocations: vLLM's handler is called, and no route of ours."""
    before, after = service(catalogues["a"], Path()), service(catalogues["b"], Path())
    monkeypatch.setattr(install, "service_of", lambda _: before)
    monkeypatch.setattr("nezha_vllm.frontend.completions.prepare", lambda request, _: request)
    monkeypatch.setattr("nezha_vllm.frontend.options.make_plan", lambda *_: None)

    async def render(handler: Any, request: Any, raw_request: Any) -> Service:
        return service_for_request(after)

    handler, request = SimpleNamespace(model_config=None), SimpleNamespace(to_sampling_params=lambda *_: None)
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
        for step in range(60):
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
