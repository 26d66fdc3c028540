"""Requests that schemathesis makes from the server's own OpenAPI description, right by it and wrong by it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import schemathesis
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode

from benchmarks.reliability.bad_input import COMPLETIONS, Known, Sent, encode

# other paths that lead to code of ours and take input; /invocations has no description
OTHERS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/generative_scoring",
    "/tokenize",
    "/detokenize",
)


@cache
def completions(description: bytes, known: Known) -> SearchStrategy[Sent]:
    """A third as described, a third not, and a third with one or two fields beside a prompt that can be answered.

    Args:
        description: what the server has under ``/openapi.json``.
    """
    operation = schemathesis.openapi.from_dict(json.loads(description))[COMPLETIONS]["POST"]
    right = operation.as_strategy()
    beside = st.builds(_beside_a_prompt, right, st.sampled_from(known.items), st.integers(0, 7))
    return st.one_of(
        right.map(_sent), operation.as_strategy(generation_mode=GenerationMode.NEGATIVE).map(_sent), beside
    )


@cache
def other_routes(description: bytes, known: Known) -> SearchStrategy[Sent]:
    """The same for the routes of ``OTHERS`` that the server has, one as often as the other."""
    schema = schemathesis.openapi.from_dict(json.loads(description))
    found = [schema[path]["POST"] for path in OTHERS if path in schema]
    return st.one_of(*(of.as_strategy(generation_mode=mode).map(_sent) for of in found for mode in GenerationMode))


def _sent(case: Any) -> Sent:
    return case.path, _bytes(case.body)


def _beside_a_prompt(case: Any, item: str, at: int) -> Sent:
    fields = list(case.body.items()) if isinstance(case.body, dict) else []
    few = {name: value for name, value in fields[at : at + 2] if name != "model"}
    return case.path, _bytes(few | {"prompt": f"<item:{item}>"})


def _bytes(body: Any) -> bytes:
    """Schemathesis has a marker of its own where there is no body."""
    try:
        return encode(body)
    except TypeError:
        return b""
