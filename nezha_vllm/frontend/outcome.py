"""What became of a request, told from the messages that answer it: the same for every way through the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

NOBODY_READS_IT = b"null"  # what vLLM's handler, like ours, answers a client that has left
FAILED_STREAM = b'data: {"error"'
OVERLOADED = (429, 503)


class Outcome:
    """An ASGI ``send`` that looks at what goes through it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status = 0
        self._ended = self._left = self._failed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self._left = body == NOBODY_READS_IT
            self._failed = self._failed or body.startswith(FAILED_STREAM)
            self._ended = not message.get("more_body", False)
        await self._send(message)

    @property
    def name(self) -> str:
        """One of ``metrics.OUTCOMES``; to be read when the route is done."""
        if self._status in OVERLOADED:
            return "overloaded"
        if self._status in range(400, 500):
            return "refused"
        if self._failed or self._status not in range(200, 300):  # 0: an error on its way to the server's last resort
            return "failed"
        return "answered" if self._ended and not self._left else "disconnected"
