"""Asking a NEZHA server through the stock OpenAI client. Knows HTTP answers only: no torch, no vLLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI


@dataclass(frozen=True)
class Item:
    """One choice of an answer; ``score`` is what items are ordered by, see docs/http-api.md."""

    item_id: str
    score: float
    semantic_id: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """Ranked items, best first, and how long it took; ``reason`` says why there are fewer than asked."""

    items: tuple[Item, ...]
    milliseconds: float
    catalogue_version: str
    reason: str | None = None


def prompt(history: Sequence[str]) -> str:
    """The prompt of a history of item IDs, oldest first."""
    return "".join(f"<item:{item_id}>" for item_id in history)


def connect(url: str, timeout: float = 60.0) -> OpenAI:
    """A client of the server at ``url``, such as ``http://127.0.0.1:8000``. vLLM wants no key unless told to."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", timeout=timeout, max_retries=0)


def recommend(client: OpenAI, history: Sequence[str], n: int, model: str | None = None, **options: Any) -> Answer:
    """The ``n`` best items for a history.

    Args:
        model: default: the first that the server has.
        options: `vllm_xargs`, such as ``beam_width`` or ``validity``.

    Raises:
        openai.BadRequestError: what the server refuses and why.
        openai.APIConnectionError: no server there.
    """
    model = model or client.models.list().data[0].id
    start = time.perf_counter()
    completion: Any = client.completions.create(
        model=model,
        prompt=prompt(history),
        n=n,
        extra_body={"vllm_xargs": options} if options else None,
    )
    milliseconds = 1000 * (time.perf_counter() - start)
    items = tuple(Item(choice.text, choice.score, tuple(choice.semantic_id)) for choice in completion.choices)
    [summary] = completion.nezha
    return Answer(items, milliseconds, summary["catalogue_version"], summary["reason"])
