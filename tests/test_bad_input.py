"""Input that no client should send: limits of what a request may hold, and a fuzzer against a real server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import HTTPException
from vllm.exceptions import VLLMValidationError

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.frontend import body_limit
from nezha_vllm.frontend.body_limit import MAX_BODY, SMALL_BODY, BodiesFull, Body
from nezha_vllm.frontend.completions import MAX_ENTRIES, MAX_ITEMS, check_batch
from nezha_vllm.frontend.options import OPTIONS, check_search
from nezha_vllm.frontend.prompts import CHARACTERS_A_TOKEN, expand_items
from nezha_vllm.frontend.request_shape import check_shape
from nezha_vllm.frontend.rules import read_rules
from nezha_vllm.frontend.service import Service

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks.reliability.fuzz import known_of
from benchmarks.reliability.fuzz_client import DAMAGED, GRAMMAR, OPENAPI, Client, fuzz, good_answer


def service(max_model_len: int = 64) -> Service:
    settings: Any = SimpleNamespace(beam_width=50, max_beam_width=512, validity="stepwise")
    catalogue = Catalogue.build(["a", "b"], [[0, 1], [1, 0]], [2, 2], segments={"red": [True, False]})
    return Service(settings, catalogue, (0, 2), (4, 5), 6, max_model_len)


@pytest.mark.parametrize("part", ["<item:", "<a_", "<item:a", "<a_1", "<sp_1>", "<", "9"])
def test_what_a_prompt_costs_grows_with_its_length_alone(part: str) -> None:
    """An open bracket must not be sought to the end of the text by each of those that open."""
    text = part * 1_000 + "x" * 2_000_000
    begun = time.process_time()
    with suppress(VLLMValidationError):
        expand_items(text, service(max_model_len=40_003))
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("text", "what"), [("<item:a>" * 62, "62 items"), ("x" * (61 * CHARACTERS_A_TOKEN + 1), "characters")]
)
def test_a_prompt_that_no_model_of_this_length_takes_is_refused_before_it_is_read(text: str, what: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"{what}; send at most"):
        expand_items(text, service())
    expand_items("<item:a>" * 61, service())


VALUES = ["x" * 1_000_000, ["x" * 1_000_000], [["x" * 1_000_000]], 10**4000, -(10**4000), float("nan"), {"x": 1}, None]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", [*OPTIONS, "x" * 1_000_000], ids=lambda name: name[:20])
def test_values_of_every_kind_are_taken_or_refused_with_a_short_message(name: str, value: Any) -> None:
    refusal = None
    try:
        check_search(service(), 1, {name: value})
        read_rules(service(), {name: value}, [0, 3, 4, 5])
    except VLLMValidationError as error:
        refusal = error
    if refusal is not None:
        assert len(str(refusal)) < 600
        assert str(refusal.parameter)[:80] == name[:80]


def test_quotes_of_a_prompt_are_short() -> None:
    for text in (f"<item:{'x' * 9_000}>", f"<a_{'9' * 9_000}>", f"<q_{'9' * 9_000}>"):
        with pytest.raises(VLLMValidationError) as caught:
            expand_items(text, service())
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("parts", [[MAX_BODY + 1], [MAX_BODY, 1], [1] * 3 + [MAX_BODY]])
def test_a_body_without_end_is_not_read_to_its_end(parts: list[int]) -> None:
    read: list[int] = []

    async def receive() -> dict[str, Any]:
        read.append(parts[len(read)])
        return {"type": "http.request", "body": bytes(read[-1]), "more_body": True}

    async def everything() -> None:
        with Body(receive) as body:
            for _ in parts:
                await body.receive()

    with pytest.raises(HTTPException) as caught:
        asyncio.run(everything())
    assert caught.value.status_code == 413
    assert read == parts


def test_bodies_together_have_a_limit_and_the_largest_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "MAX_BODIES", 2 * MAX_BODY - SMALL_BODY)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(MAX_BODY)}

    async def small() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(SMALL_BODY)}

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def run() -> None:
        for _ in range(2):  # what has ended makes room
            with Body(receive) as one, Body(receive) as two, Body(receive) as three:
                for body in (one, two):
                    assert len((await body.receive())["body"]) == MAX_BODY
                with pytest.raises(BodiesFull):
                    await three.receive()
                with Body(small) as usual:  # most requests are small, and come through
                    assert len((await usual.receive())["body"]) == SMALL_BODY
                with Body(gone) as left:  # meanwhile, a client that is being answered may leave
                    assert (await left.receive())["type"] == "http.disconnect"
            assert Body.held == 0

    asyncio.run(run())
    assert BodiesFull().status_code == 503


@pytest.mark.parametrize("prompt", [["a"] * 100, [[1]] * 100])
def test_prompts_times_items_have_a_limit(prompt: list[Any]) -> None:
    check_batch(prompt, MAX_ITEMS // 100, {})
    check_batch([1] * 1_000, MAX_ITEMS, {})  # the token ids of one prompt
    with pytest.raises(VLLMValidationError, match="lower n"):
        check_batch(prompt, MAX_ITEMS // 100 + 1, {})


def test_prompts_times_entries_of_a_rule_have_a_limit() -> None:
    most = {"exclude_items": ["a"] * (MAX_ENTRIES // 64)}
    check_batch(["a"] * 64, 1, most)
    check_batch("a", 1, {"exclude_items": ["a"] * (MAX_ENTRIES + 1)})
    with pytest.raises(VLLMValidationError, match="65 prompts with 4096 entries of exclude_items"):
        check_batch(["a"] * 65, 1, most)


MANY = 2_000
COSTLY: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": [1.5] * MANY}),
    ("prompt", {"prompt": [{}] * MANY}),
    ("prompt", {"prompt": ["a"] * MANY}),
    ("prompt", {"prompt": [[1]] * MANY}),
    ("prompt", {"prompt": [*[1] * MANY, "a"]}),
    ("prompt", {"prompt": [["a"] * MANY]}),
    ("prompt", {"prompt": [[1], ["a"]] * 50}),
    ("exclude_items", {"prompt": "a", "vllm_xargs": {"exclude_items": [{}] * MANY}}),
    ("allow_items", {"prompt": "a", "vllm_xargs": {"allow_items": {str(i): i for i in range(MANY)}}}),
    ("vllm_xargs", {"prompt": "a", "vllm_xargs": [1] * MANY}),
    ("vllm_xargs", {"prompt": "a", "vllm_xargs": {str(i): i for i in range(MANY)}}),
    ("stop_token_ids", {"prompt": "a", "stop_token_ids": ["x"] * MANY}),
    ("other", {"prompt": "a", "other": [[[0] * 40] * 40]}),
    ("body", {str(i): i for i in range(MANY)}),
    ("body", {"prompt": "a", "x" * 20_000: 1}),
    ("model", {"prompt": "a", "model": "x" * 20_000}),
    ("request_id", {"prompt": "a", "request_id": "x" * 20_000}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"x" * 20_000: 1}}),
    ("stop", {"prompt": "a", "stop": ["x" * 10_000] * 2}),
    ("structured_outputs", {"prompt": "a", "structured_outputs": "regex"}),  # an AttributeError in vLLM 0.32
]


@pytest.mark.parametrize(("parameter", "body"), COSTLY)
def test_what_would_be_costly_to_validate_is_refused_before(parameter: str, body: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        check_shape(json.dumps(body).encode())
    assert caught.value.parameter == parameter
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": [5] * 100_000},
        {"prompt": ["a"] * 1_024},
        {"prompt": [[5] * 1_000] * 1_024},
        {"prompt": [1.5, "a", [], {}]},
        {"prompt": "a", "vllm_xargs": {"exclude_items": ["a", 1] * 32_768, "allow_items": []}},
        {"prompt": "a", "stop": ["x"] * 4, "logit_bias": {"1": 2}},
    ],
    ids=lambda body: str(body)[:30],
)
def test_every_request_that_can_be_answered_and_short_ones_are_left_alone(body: dict[str, Any]) -> None:
    check_shape(json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff", b"NaN"])
def test_what_is_no_json_object_is_left_to_fastapi(body: bytes) -> None:
    check_shape(body)


@pytest.mark.slow
@pytest.mark.parametrize(("parameter", "body"), COSTLY)
def test_a_server_refuses_it_as_well(server: str, parameter: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request, timeout=30)
    assert json.loads(caught.value.read())["error"]["param"] == parameter


@pytest.mark.slow
@pytest.mark.parametrize(("part", "count"), [(GRAMMAR, 250), (DAMAGED, 150), (OPENAPI, 80)])
def test_a_server_answers_generated_requests_with_2xx_or_4xx(
    server: str, checkpoint: Path, part: str, count: int
) -> None:
    """`benchmarks/reliability/fuzz.py` does it with 100,000."""
    known = known_of(checkpoint, Catalogue.load(checkpoint / "catalogue"))
    port = urlsplit(server).port
    assert port is not None
    expected = good_answer(Client(port, known), known)
    found = fuzz(port, known, part, 0, count, expected)
    assert found.problems == []
    assert found.requests >= count
    assert found.statuses[200] > 0
    assert found.statuses[400] > count // 4
