"""Machines that serve together notice when one of them is gone, and that they started with different catalogues."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest

from nezha_vllm import heartbeat
from nezha_vllm.heartbeat import BEAT, GREETING, RemoteEngines, until_head_is_gone
from nezha_vllm.server import free_port

Told = list[str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("INTERVAL", 0.05), ("SILENCE", 0.4), ("PATIENCE", 0.8)):
        monkeypatch.setattr(heartbeat, name, seconds)


def at_the_head(scene: Callable[[int, Told], Awaitable[None]], version: str = "monday") -> Told:
    """What the API that expects engine 1 was told in a scene, to which its port is given."""
    told: Told = []

    async def run() -> None:
        port = free_port()
        watch = asyncio.create_task(RemoteEngines([1], version, told.append).watch("127.0.0.1", port))
        await asyncio.sleep(0.1)
        await scene(port, told)
        watch.cancel()

    asyncio.run(run())
    return told


async def connect(port: int, hello: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.readexactly(len(GREETING)) == GREETING
    writer.write(hello)
    return reader, writer


def test_engine_and_api_hear_of_each_other_until_one_ends() -> None:
    reasons: Told = []

    async def scene(port: int, told: Told) -> None:
        engine = asyncio.to_thread(until_head_is_gone, ("127.0.0.1", port), 1, "monday", 5.0)
        engine = asyncio.create_task(engine)
        await asyncio.sleep(1.2)  # three times the silence that is allowed, and longer than the patience
        assert not told
        assert not engine.done()
        for task in asyncio.all_tasks() - {asyncio.current_task(), engine}:
            task.cancel()  # the head ends
        reasons.append(await engine)

    at_the_head(scene)
    assert reasons == ["its process has ended"]


def test_the_api_hears_that_an_engines_process_has_ended() -> None:
    async def scene(port: int, told: Told) -> None:
        reader, writer = await connect(port, b"1 monday\n")
        await reader.readexactly(1)
        writer.close()
        await asyncio.sleep(0.2)

    assert at_the_head(scene) == ["engine 1 is gone: its process has ended"]


def test_a_machine_that_falls_silent_is_gone() -> None:
    async def scene(port: int, told: Told) -> None:
        _, writer = await connect(port, b"1 monday\n")
        await asyncio.sleep(0.6)
        writer.close()

    [reason] = at_the_head(scene)
    assert "engine 1 is gone: its machine has been silent" in reason


def test_an_engine_that_does_not_connect_is_missed() -> None:
    async def scene(port: int, told: Told) -> None:
        await asyncio.sleep(1.0)

    [reason] = at_the_head(scene)
    assert "engine 1 does not connect" in reason


def test_machines_that_start_with_different_catalogues_are_told_how_to_agree() -> None:
    async def scene(port: int, told: Told) -> None:
        _, writer = await connect(port, b"1 tuesday\n")
        await asyncio.sleep(0.2)
        writer.close()

    reason, *_ = at_the_head(scene)
    assert "engine 1 has started with catalogue version tuesday, this machine with monday" in reason
    assert "catalogue_version" in reason


@pytest.mark.parametrize("hello", [b"2 monday\n", b"GET / HTTP/1.1\r\n", b"\xff\x00", b"1" * 100_000, b""])
def test_strangers_are_ignored(hello: bytes) -> None:
    async def scene(port: int, told: Told) -> None:
        _, writer = await connect(port, hello)
        await asyncio.sleep(0.5)
        writer.close()

    assert at_the_head(scene) == []


def test_an_engine_says_nothing_to_a_socket_that_is_not_the_apis() -> None:
    """While vLLM starts, its own socket listens there."""
    said = []
    with socket.create_server(("127.0.0.1", 0)) as vllms:
        address = vllms.getsockname()

        def serve() -> None:
            link, _ = vllms.accept()
            link.sendall(b"\xff" + bytes(9))
            said.append(link.recv(64))
            link.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert "did not come up" in until_head_is_gone(address, 1, "monday", 0.1)
        thread.join()
    assert said == [b""]


def test_an_engine_does_not_wait_for_a_silent_api() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:

        def serve() -> None:
            link, _ = head.accept()
            link.sendall(GREETING)
            assert link.recv(64) == b"1 monday\n"
            link.sendall(BEAT)
            assert link.recv(64) == BEAT
            link.recv(64)  # and nothing more from this side
            link.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert "silent" in until_head_is_gone(head.getsockname(), 1, "monday", 5.0)
        thread.join()
