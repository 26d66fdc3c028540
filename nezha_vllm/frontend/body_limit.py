"""A request's body has a largest size, and so have all bodies together: with it, everything that they hold has one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from types import TracebackType
from typing import Any

from fastapi import HTTPException

MAX_BODY = 16 << 20  # bytes; two lists of 65,536 item IDs of 40 characters are 6 MB
SMALL_BODY = 64 << 10  # so much of each is let in whatever others hold: uploads that stall turn no usual request away
MAX_BODIES = 1 << 30  # of what is beyond that, of all requests of an API process: 64 of the largest bodies
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class BodiesFull(HTTPException):
    """There is no room for more of a body now."""

    def __init__(self) -> None:
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, "this server holds as many bodies of requests as it can")


class Body:
    """An ASGI ``receive`` that counts, inside of a context: as long as the request lasts, its body is in memory.

    It raises a 413 where the body goes beyond ``MAX_BODY``, and `BodiesFull` where it is not small and all of them
    together go beyond ``MAX_BODIES``, before the rest is read.
    """

    held = 0  # by all

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size, self._counted = receive, 0, 0

    def __enter__(self) -> Body:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Body.held -= self._counted

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        part = len(message.get("body", b""))
        self._size += part
        more = max(0, self._size - SMALL_BODY) - self._counted
        self._counted += more
        Body.held += more
        if self._size > MAX_BODY:
            most = f"{MAX_BODY >> 20} MiB"
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {most}; send several requests"
            )
        if more and Body.held > MAX_BODIES:
            raise BodiesFull
        return message
