"""Who waits at the door is let in at once, and API processes still share connections evenly."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("vllm")
from nezha_vllm.frontend.accepting import accept_more, balanced_server


@pytest.fixture
def door() -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=256)) as listening:
        listening.setblocking(False)
        yield listening


class Listening:
    """What of vLLM's server has to do with it. It asks once, as in one pass of its event loop."""

    def __init__(self, *loads: int) -> None:
        self.peer_loads, self._connecting, self._before = (list(loads), 0), 0, loads[0]
        self.connected: list[socket.socket] = []

    def _publish_load(self) -> None:
        self.peer_loads[0][0] = self._before + self._connecting

    def _track(self, connecting: Any) -> None:
        self.connected.append(connecting)

    def _connect(self, loop: Any, connection: socket.socket) -> socket.socket:
        return connection

    async def _accept(self, sock: Any) -> None:
        self.connected.append(sock.accept()[0])


@pytest.mark.parametrize(
    ("loads", "waiting", "accepted"),
    [
        ((0, 0, 0), 30, 1),  # others get the next ones
        ((5, 5), 30, 1),
        ((100, 100), 30, 11),
        ((100, 120), 60, 33),
        ((0, 2**31 - 1), 60, 60),  # the other one does not accept yet
        ((150, 100), 30, 1),  # vLLM has given the others their time
    ],
)
def test_one_goes_on_accepting_while_it_has_hardly_more_than_another(
    door: socket.socket, loads: tuple[int, ...], waiting: int, accepted: int
) -> None:
    server = Listening(*loads)
    clients = [socket.create_connection(door.getsockname()) for _ in range(waiting)]
    asyncio.run(accept_more(Listening._accept)(server, door))
    for connection in [*clients, *server.connected]:
        connection.close()
    assert len(server.connected) == accepted


def test_the_server_of_this_vllm_serves_a_crowd(door: socket.socket) -> None:
    import uvicorn

    kind = balanced_server()
    if kind is None:
        pytest.skip("this vLLM lets the event loop accept")

    class Crowded(kind):  # type: ignore[misc, valid-type]
        _accept = accept_more(kind._accept)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def answered() -> int:
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        config.load()
        server = Crowded(config, peer_loads=([0, 100], 0))
        streams = [await asyncio.open_connection(*door.getsockname()) for _ in range(150)]
        running = asyncio.create_task(server.serve(sockets=[door]))
        for _, writer in streams:
            writer.write(b"GET / HTTP/1.1\r\nHost: door\r\n\r\n")
        answers = [await reader.readuntil(b"ok") for reader, _ in streams]
        for _, writer in streams:
            writer.close()
        server.should_exit = True
        await running
        return len(answers)

    assert asyncio.run(answered()) == 150
