"""How many requests an API process works on at once: whoever comes beyond is told to come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from fastapi.responses import JSONResponse

RETRY_AFTER_SECONDS = 1


class Admission:
    """A request counts from the moment its body is there.

    Args:
        most: requests at once, 0 for any number. A list of prompts is as many, and begins where one more would.
        searches: how many searches are under way: those of a stream outlive the handler.
    """

    def __init__(self, most: int, searches: Callable[[], int]) -> None:
        self._most, self._searches, self._requests = most, searches, 0

    @property
    def limited(self) -> bool:
        return self._most > 0

    @property
    def full(self) -> bool:
        return 0 < self._most <= max(self._requests, self._searches())

    @contextmanager
    def request(self) -> Iterator[None]:
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    @contextmanager
    def prompts(self, count: int) -> Iterator[bool]:
        """Inside of `request`, where the number of its prompts is known; whether they are admitted.

        Between the two others may have come that are known to be many now.
        """
        if 0 < self._most <= max(self._requests - 1, self._searches()):
            yield False
            return
        self._requests += count - 1
        try:
            yield True
        finally:
            self._requests -= count - 1

    def refusal(self) -> JSONResponse:
        """What a client gets when it is full."""
        message = f"this server works on {self._most} requests and takes no more; try again in a moment"
        error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return JSONResponse({"error": error}, HTTPStatus.SERVICE_UNAVAILABLE, headers)
