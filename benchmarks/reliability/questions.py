"""Requests whose answers are known, so that every answer under load can be checked."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.reliability.versions import TOLERANCE, Ranking, difference, rankings
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.client import prompt


@dataclass(frozen=True)
class Questions:
    """Prompts and the best items of each by catalogue version, with scores that may be off by ``tolerance``.

    More than ``n`` of them may be known: then what comes in where scores are nearly equal is checked as well.

    Where scores are inexact, so is which prefix is the last of a beam, and an item may come or be lost with it. With a
    ``margin`` above 1 the expected items are those of a beam so many times as wide, and only what one as many times
    narrower finds must not be missing: ``sure``.
    """

    prompts: list[str]
    expected: Mapping[str, list[Ranking]]
    n: int
    tolerance: float = TOLERANCE
    beam_width: int | None = None
    sure: Mapping[str, list[frozenset[str]]] | None = None

    @classmethod
    def of_model(
        cls,
        checkpoint: Path,
        catalogues: Sequence[Catalogue],
        histories: Sequence[Sequence[str]],
        n: int,
        *,
        depth: int | None = None,
        beam_width: int | None = None,
        margin: int = 1,
        dtype: str = "float32",
        tolerance: float = TOLERANCE,
    ) -> Questions:
        """As transformers answers, in a process of its own that leaves no memory in use, on a GPU neither."""

        def ask(width: int | None) -> dict[str, list[Ranking]]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                fresh = [replace(catalogue) for catalogue in catalogues]  # an index cannot be sent to a process
                asked = (checkpoint, fresh, histories, _most(depth or n, width), width, dtype)
                return process.submit(rankings, *asked).result()

        prompts = [prompt(history) for history in histories]
        return cls._of(prompts, ask, n, tolerance, beam_width, margin)

    @classmethod
    def of_server(
        cls,
        url: str,
        histories: Sequence[Sequence[str]],
        n: int,
        *,
        depth: int | None = None,
        beam_width: int | None = None,
        margin: int = 1,
        tolerance: float = TOLERANCE,
    ) -> Questions:
        """As a server with one catalogue answers when it has nothing else to do."""
        prompts = [prompt(history) for history in histories]

        def ask(width: int | None) -> dict[str, list[Ranking]]:
            deep = cls(prompts, {}, _most(depth or n, width), tolerance, width)
            expected: dict[str, list[Ranking]] = {}
            for which in range(len(prompts)):
                request = urllib.request.Request(
                    f"{url}/v1/completions", deep.body(which), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as response:
                    version, ranking = _read(response.read())
                expected.setdefault(version, []).append(ranking)
            if len(expected) > 1:
                raise RuntimeError(f"the server swaps its catalogue: {list(expected)}")
            return expected

        return cls._of(prompts, ask, n, tolerance, beam_width, margin)

    @classmethod
    def _of(
        cls,
        prompts: list[str],
        ask: Callable[[int | None], dict[str, list[Ranking]]],
        n: int,
        tolerance: float,
        beam_width: int | None,
        margin: int,
    ) -> Questions:
        if margin == 1:
            return cls(prompts, ask(beam_width), n, tolerance, beam_width)
        if margin < 1 or beam_width is None:
            raise ValueError(f"a margin of {margin}: it is 1 or more, and needs a beam width (--margin, --beam-width)")
        narrow = ask(max(n, beam_width // margin))
        sure = {version: [frozenset(item for item, _ in one) for one in many] for version, many in narrow.items()}
        return cls(prompts, ask(beam_width * margin), n, tolerance, beam_width, sure)

    def body(self, which: int, **fields: Any) -> bytes:
        if self.beam_width is not None:
            fields["vllm_xargs"] = {"beam_width": self.beam_width, **fields.get("vllm_xargs", {})}
        return json.dumps({"prompt": self.prompts[which], "n": self.n, **fields}).encode()

    def check(self, which: int, content: bytes) -> tuple[str, str | None]:
        """The version that answered a request, and what is wrong with its answer."""
        try:
            version, found = _read(content)
        except (KeyError, TypeError, ValueError) as error:
            return "none", f"no answer but {content[:200]!r} ({error!r})"
        if version not in self.expected:
            return version, f"an answer of version {version}"
        sure = self.sure[version][which] if self.sure else None
        wrong = difference(found, self.expected[version][which], self.tolerance, self.n, sure)
        return version, None if wrong is None else f"version {version}, prompt {which}: {wrong}"

    def mistakable(self) -> str:
        """How many expected answers would pass for that of another prompt or version: what the check cannot see."""
        known = [(version, ranking) for version, rankings in self.expected.items() for ranking in rankings]
        passing = sum(
            difference(one[: self.n], other, self.tolerance, self.n) is None
            for place, (_, one) in enumerate(known)
            for index, (_, other) in enumerate(known)
            if index != place
        )
        return f"{passing} of {len(known) * (len(known) - 1):,} pairs of different answers pass for each other"


def _most(depth: int, width: int | None) -> int:
    """A beam finds no more than it is wide."""
    return depth if width is None else min(depth, width)


def some_histories(catalogue: Catalogue, count: int) -> list[list[str]]:
    """Random ones of 1 to 20 items."""
    rng, rows = random.Random(0), range(catalogue.num_items)
    return [catalogue.item_ids(rng.choices(rows, k=rng.randint(1, 20))) for _ in range(count)]


def _read(content: bytes) -> tuple[str, Ranking]:
    """Version and items. Raises ``ValueError`` where the choices are of several versions, or there is none."""
    choices = json.loads(content)["choices"]
    versions = {choice["catalogue_version"] for choice in choices}
    if len(versions) != 1:
        raise ValueError(f"versions {sorted(versions)}")
    return versions.pop(), [(choice["text"], choice["score"]) for choice in choices]
