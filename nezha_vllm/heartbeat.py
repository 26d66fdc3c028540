"""Engines of other machines and the machine with their API, each of which ends when it no longer hears of the other.

vLLM 0.32 watches processes of its own machine alone: where an engine of another one was killed, its share of the
requests waited for ever, and engines outlived their API. So a TCP connection joins each such engine to the API, at the
address where vLLM's start-up is over by then. The API says who it is, the engine who it is and with which catalogue it
started, and from then on both send a byte every second, whatever a step takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Collection

logger = logging.getLogger("vllm.nezha")

GREETING = b"nezha-vllm heartbeat 1\n"
BEAT = b"."
ENDED = "its process has ended"
INTERVAL = 1.0
SILENCE = 10.0  # seconds after which the other side is gone
PATIENCE = 60.0  # seconds that engines, which were there a moment ago, may take to connect


class RemoteEngines:
    """The API's side.

    Args:
        ranks: of the engines that must be there.
        version: of the catalogue, with which all must have started.
        lost: called with the reason, and more than once, when one is not or is gone.
    """

    def __init__(self, ranks: Collection[int], version: str, lost: Callable[[str], None]) -> None:
        self._missing, self._version, self._lost = set(ranks), version, lost
        self._ranks = frozenset(ranks)

    async def watch(self, host: str, port: int) -> None:
        """Until cancelled."""
        async with await self._listen(host, port):
            await asyncio.sleep(PATIENCE)
            for rank in self._missing:
                self._lost(f"engine {rank} does not connect to {host}:{port}: does its machine run this nezha-vllm?")
            await asyncio.Event().wait()

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await asyncio.start_server(self._attend, host, port)
            except OSError as error:  # vLLM's own start-up has it a moment longer
                if time.monotonic() > deadline:
                    self._lost(f"cannot listen at {host}:{port} for engines of other machines ({error.strerror})")
                    raise
                await asyncio.sleep(INTERVAL)

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(GREETING)
            async with asyncio.timeout(SILENCE):
                text, _, version = (await reader.readline()).decode().strip().partition(" ")
            if (rank := int(text)) not in self._ranks:
                return
        except (ValueError, TimeoutError, OSError):
            return  # a stranger
        else:
            self._missing.discard(rank)
            if version != self._version:
                self._lost(
                    f"engine {rank} has started with catalogue version {version}, this machine with {self._version}: "
                    "publish one of them to the stores of both, or name it on both with catalogue_version"
                )
            self._lost(f"engine {rank} is gone: {await _until_silent(reader, writer)}")
        finally:
            writer.close()


async def _until_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Why the other side is held to be gone."""
    try:
        while True:
            writer.write(BEAT)
            async with asyncio.timeout(SILENCE):
                if not await reader.read(64):
                    return ENDED
            await asyncio.sleep(INTERVAL)
    except OSError as error:
        return _why(error, "its machine")


def until_head_is_gone(address: tuple[str, int], rank: int, version: str, start_seconds: float) -> str:
    """An engine's side: returns why the API is held to be gone; waits for it for ``start_seconds`` at first."""
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(address, SILENCE) as link:
            # behind vLLM's start-up, whose socket must not be sent a word
            if link.recv(len(GREETING)) == GREETING:
                link.sendall(f"{rank} {version}\n".encode())
                return _while_it_beats(link)
        time.sleep(INTERVAL)
    return f"it did not come up within {start_seconds:.0f} s"


def _while_it_beats(link: socket.socket) -> str:
    try:
        while link.recv(64):
            link.sendall(BEAT)
        return ENDED
    except OSError as error:
        return _why(error, "it")


def _why(error: OSError, other: str) -> str:
    if isinstance(error, TimeoutError):
        return f"{other} has been silent for {SILENCE:g} s"
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):  # it ended with a beat of ours unread
        return ENDED
    return error.strerror or repr(error)
