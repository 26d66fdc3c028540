"""New requests out of generated ones: fields and options of two, and values under names that they were not made for."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

from benchmarks.reliability.bad_input import Sent, encode

LARGEST = 20_000  # bytes of a request that is mixed: long lists need no repetition
CONFUSED = 0.2  # of the mixtures have a value under another field's name


class Mixtures:
    """Remembers the last requests and mixes each new one with some of them."""

    def __init__(self, number: int, each: int) -> None:
        self._rng = random.Random(number)
        self._each = each
        self._earlier: deque[dict[str, Any]] = deque(maxlen=200)

    def of(self, sent: Sent) -> Iterator[Sent]:
        """The request itself, then its mixtures."""
        yield sent
        path, body = sent
        try:
            fields = json.loads(body) if len(body) <= LARGEST else None
        except (ValueError, RecursionError):
            return
        if not isinstance(fields, dict):
            return
        for _ in range(self._each if self._earlier else 0):
            yield path, encode(self._mixed(fields, self._rng.choice(self._earlier)))
        self._earlier.append(fields)

    def _mixed(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        mixed = self._either(one, other)
        options = [fields.get("vllm_xargs") for fields in (one, other)]
        if isinstance(options[0], dict) and isinstance(options[1], dict):
            mixed["vllm_xargs"] = self._either(*options)
        if mixed and self._rng.random() < CONFUSED:
            names = sorted(mixed)
            mixed[self._rng.choice(names)] = mixed[self._rng.choice(names)]
        return mixed

    def _either(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Most fields of both; where they have the same, mostly the second's."""
        return {name: value for fields in (one, other) for name, value in fields.items() if self._rng.random() < 0.6}
