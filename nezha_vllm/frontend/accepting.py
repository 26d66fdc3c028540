"""A crowd of new connections is let in at once, to be told what to do.

With several API processes vLLM accepts one connection a pass of an event loop, in the process that has the fewest. A
pass of a busy process serves all connections it has, so a crowd gets in one by one. Those outside cannot be turned
away: they wait in the kernel's queue, or for a place in it, until somebody gives up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

MORE = 1.1  # times the connections of whichever other process has the fewest: as far as one may go on in a pass


def balanced_server() -> type | None:
    """vLLM's class; None where it lets the event loop accept, which takes all that wait."""
    try:
        from vllm.entrypoints.launchers.launcher import NoSignalServer
    except ImportError:
        return None
    return NoSignalServer if hasattr(NoSignalServer, "_accept") else None


def accept_more(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``NoSignalServer._accept``, which still waits, and leaves a single connection to the idlest process."""

    async def accept(self: Any, sock: Any) -> None:
        await original(self, _Crowd(self, sock))

    return accept


class _Crowd:
    """A listening socket that gives the server more connections than the one it asked for, while others wait."""

    def __init__(self, server: Any, sock: Any) -> None:
        self._server, self._sock = server, sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def accept(self) -> Any:
        asked_for = self._sock.accept()
        server, loop = self._server, asyncio.get_running_loop()
        loads, index = server.peer_loads
        while loads[index] + 1 <= MORE * min(load for other, load in enumerate(loads) if other != index):
            try:
                connection, _ = self._sock.accept()
            except OSError:  # nobody else; if it is something worse, it is reported when it is asked for
                break
            server._connecting += 1
            server._publish_load()
            server._track(server._connect(loop, connection))
        return asked_for
