"""A request's body has a largest size: with it, everything that the body holds has one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

MAX_BODY = 16 << 20  # bytes; two lists of 65,536 item IDs of 40 characters are 6 MB
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def limited(receive: Receive) -> Receive:
    """An ASGI ``receive`` that raises a 413 where a body goes beyond ``MAX_BODY``, before the rest is read."""
    size = 0

    async def receive_part() -> MutableMapping[str, Any]:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            most = f"{MAX_BODY >> 20} MiB"
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {most}; send several requests"
            )
        return message

    return receive_part
