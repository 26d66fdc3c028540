"""A client that sends generated requests one after the other and judges every answer."""

from __future__ import annotations

import http.client
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.reliability.bad_input import COMPLETIONS, INVOCATIONS, Known, Sent, by_grammar, damaged, encode
from benchmarks.reliability.mixtures import Mixtures
from benchmarks.reliability.schema_input import completions, other_routes
from benchmarks.reliability.versions import Ranking, difference

OPENAPI, OTHERS, GRAMMAR, DAMAGED = "OpenAPI", "OpenAPI of other routes", "prompts and options", "damaged JSON"
GOOD_N = 10
MIXTURES = 3  # of each generated request: they take no time to make


@dataclass
class Found:
    """What became of some requests; a problem says what, and which request it was."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_part: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[str] = field(default_factory=list)
    streams: int = 0
    items: int = 0
    good: int = 0

    @property
    def requests(self) -> int:
        return self.statuses.total()

    def add(self, other: Found) -> None:
        self.statuses += other.statuses
        for part, statuses in other.by_part.items():
            self.by_part[part] += statuses
        self.problems += other.problems
        self.streams, self.items, self.good = (
            self.streams + other.streams,
            self.items + other.items,
            self.good + other.good,
        )


class Client:
    """One connection to a server."""

    def __init__(self, port: int, known: Known) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._known = known
        self.found = Found()

    def send(self, path: str, body: bytes, method: str = "POST") -> tuple[int, str, bytes]:
        """Status, media type and body of the answer."""
        waiting = self._connection.sock is not None
        try:
            return self._exchange(path, body, method)
        except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
            if not waiting:
                raise
            return self._exchange(path, body, method)  # the server closes connections that nobody has used for 5 s

    def _exchange(self, path: str, body: bytes, method: str) -> tuple[int, str, bytes]:
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            return response.status, response.getheader("Content-Type", ""), response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def ask(self, part: str, path: str, body: bytes) -> str | None:
        """Send it; returns what is wrong with the answer."""
        try:
            status, media_type, answer = self.send(path, body)
        except (OSError, http.client.HTTPException) as error:
            status, problem = 0, f"no answer: {error!r}"
        else:
            problem = self._judge(path, status, media_type, answer)
        self.found.statuses[status] += 1
        self.found.by_part[part][status] += 1
        if problem is not None:
            self.found.problems.append(f"{path}: {problem} <- {body[:600]!r}")
        return problem

    def _judge(self, path: str, status: int, media_type: str, answer: bytes) -> str | None:
        if not (200 <= status < 300 or 400 <= status < 500):
            return f"status {status}: {answer[:200]!r}"
        if path not in (COMPLETIONS, INVOCATIONS):
            return None
        try:
            if status >= 400:
                told = json.loads(answer)
                message = told["detail"] if "detail" in told else told["error"]["message"]  # "detail": it is no JSON
                return None if isinstance(message, str) and message else f"status {status} without a message"
            if media_type.startswith("text/event-stream"):
                self.found.streams += 1
                return self._judge_stream(answer.decode())
            return self._judge_choices(json.loads(answer)["choices"])
        except (ValueError, KeyError, TypeError) as error:
            return f"status {status}, an answer that cannot be read: {error!r}"

    def _judge_stream(self, text: str) -> str | None:
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        if events[-1:] != ["[DONE]"]:
            return "a stream without end"
        chunks = [json.loads(event) for event in events[:-1]]
        errors = [chunk["error"] for chunk in chunks if "error" in chunk]
        if any(error["code"] >= 500 for error in errors):
            return f"a stream with {errors[0]}"
        return self._judge_choices([choice for chunk in chunks for choice in chunk.get("choices", [])])

    def _judge_choices(self, choices: list[dict[str, Any]]) -> str | None:
        self.found.items += len(choices)
        if len({choice["index"] for choice in choices}) < len(choices):
            return "choices with the same index"
        for choice in choices:
            codes, sizes = choice["semantic_id"], self._known.codebook_sizes
            valid = len(codes) == len(sizes) and all(map(int.__lt__, codes, sizes)) and math.isfinite(choice["score"])
            if not choice["text"] or not valid:
                return f"no item: {choice}"
        return None


def fuzz(port: int, known: Known, part: str, number: int, count: int, expected: Ranking) -> Found:
    """Send ``count`` requests of a part and mixtures of them, the same for the same ``number``.

    Then a good one, which has one answer, ``expected``.
    """
    client = Client(port, known)
    if part in (OPENAPI, OTHERS):
        description = client.send("/openapi.json", b"", "GET")[2]
        strategy = completions(description, known) if part == OPENAPI else other_routes(description, known)
    else:
        strategy = by_grammar(known) if part == GRAMMAR else damaged(known)
    mixtures = Mixtures(number, 0 if part in (DAMAGED, OTHERS) else MIXTURES)

    def ask(sent: Sent) -> None:
        for one in mixtures.of(sent):
            client.ask(part, *one)

    _for_each(strategy, number, count, ask)
    try:
        wrong = difference(good_answer(client, known), expected)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        wrong = repr(error)
    if wrong:
        client.found.problems.append(f"a good request behind round {number} of {part}: {wrong}")
    client.found.good += wrong is None
    return client.found


def good_answer(client: Client, known: Known) -> Ranking:
    """Items and scores of a request that there is nothing wrong with."""
    prompt = "".join(f"<item:{item}>" for item in known.items[:5])
    answer = json.loads(client.send(COMPLETIONS, encode({"prompt": prompt, "n": GOOD_N}))[2])
    return [(choice["text"], choice["score"]) for choice in answer["choices"]]


def _for_each(strategy: SearchStrategy[Sent], number: int, count: int, do: Callable[[Sent], None]) -> None:
    """Without hypothesis's own stop at the first problem: all of them are wanted, and none made smaller."""

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def every(sent: Sent) -> None:
        do(sent)

    every()
