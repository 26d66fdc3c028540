"""Requests whose answers are known, so that every answer under load can be checked."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.versions import TOLERANCE, Ranking, difference, rankings
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.client import prompt


@dataclass(frozen=True)
class Questions:
    """Prompts and the n best items of each, with scores that may be off by ``tolerance``."""

    prompts: list[str]
    expected: list[Ranking]
    n: int
    tolerance: float = TOLERANCE

    @classmethod
    def of_model(cls, checkpoint: Path, count: int, n: int) -> Questions:
        """As transformers answers in float32."""
        catalogue, histories = _histories(checkpoint, count)
        (expected,) = rankings(checkpoint, [catalogue], histories, n).values()
        return cls([prompt(history) for history in histories], list(expected), n)

    @classmethod
    def of_server(cls, url: str, checkpoint: Path, count: int, n: int, tolerance: float) -> Questions:
        """As a server answers when it has nothing else to do: for other precisions than float32."""
        prompts = [prompt(history) for history in _histories(checkpoint, count)[1]]
        asked = cls(prompts, [], n, tolerance)
        expected = []
        for which in range(count):
            request = urllib.request.Request(
                f"{url}/v1/completions", asked.body(which), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                expected.append(_ranking(json.loads(response.read())))
        return cls(prompts, expected, n, tolerance)

    def body(self, which: int, **fields: Any) -> bytes:
        return json.dumps({"prompt": self.prompts[which], "n": self.n, **fields}).encode()

    def problem(self, which: int, content: bytes) -> str | None:
        """What is wrong with an answer to a request."""
        try:
            found = _ranking(json.loads(content))
        except (KeyError, TypeError, ValueError) as error:
            return f"no answer but {content[:200]!r} ({error!r})"
        wrong = difference(found, self.expected[which], self.tolerance)
        return None if wrong is None else f"prompt {which}: {wrong}"


def _histories(checkpoint: Path, count: int) -> tuple[Catalogue, list[list[str]]]:
    catalogue, rng = Catalogue.load(checkpoint / "catalogue"), random.Random(0)
    items = catalogue.ids.to_pylist()
    return catalogue, [rng.choices(items, k=rng.randint(1, 20)) for _ in range(count)]


def _ranking(answer: dict[str, Any]) -> Sequence[tuple[str, float]]:
    return [(choice["text"], choice["score"]) for choice in answer["choices"]]
