"""The short way through ``/v1/completions``: which requests take it, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from nezha_vllm.frontend.disconnect import unless_disconnected
from nezha_vllm.frontend.short_way import CommonRequest, CompletionsRoute

COMMON: list[dict[str, Any]] = [
    {"prompt": "<item:1>"},
    {"prompt": [1, 2, 3], "model": "nezha", "n": 50},
    {"prompt": "<item:1>", "vllm_xargs": {"beam_width": 512, "validity": "final"}},
    {"prompt": "<item:1>", "vllm_xargs": {"exclude_items": ["i", 1], "exclude_history": True, "min_score": -3.5}},
    {"prompt": "<item:1>", "temperature": 0, "top_p": 0.5, "max_tokens": 300, "seed": 3, "stream": False, "user": "me"},
    {"prompt": "<item:1>", "use_beam_search": True, "logprobs": None},
]
OTHER: list[dict[str, Any]] = [
    {},
    {"prompt": ["<item:1>", "<item:2>"]},
    {"prompt": [[1, 2], [3]]},
    {"prompt": [1.5]},
    {"prompt": {"a": 1}},
    {"prompt": "<item:1>", "n": "5"},
    {"prompt": "<item:1>", "n": 5.0},
    {"prompt": "<item:1>", "n": True},
    {"prompt": "<item:1>", "n": None},
    {"prompt": "<item:1>", "logprobs": 0},
    {"prompt": "<item:1>", "echo": True},
    {"prompt": "<item:1>", "stop": "x"},
    {"prompt": "<item:1>", "top_p": 0},
    {"prompt": "<item:1>", "seed": 2**63},
    {"prompt": "<item:1>", "vllm_xargs": [1]},
    {"prompt": "<item:1>", "vllm_xargs": {"exclude_items": {"i": 1}}},
    {"prompt": "<item:1>", "vllm_xargs": {"exclude_items": [1.5]}},
    {"prompt": "<item:1>", "user": "u" * 16_385},
    {"prompt": "<item:1>", "a_field_of_the_next_version": None},
]


@pytest.mark.parametrize("body", COMMON)
def test_common_requests_are_read(body):
    request = msgspec.json.decode(json.dumps(body), type=CommonRequest)
    assert {name: getattr(request, name) for name in body} == body


@pytest.mark.parametrize("body", OTHER)
def test_every_other_request_is_left_to_vllm(body):
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(body), type=CommonRequest)


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}'])
def test_what_is_no_json_is_left_to_vllm(body):
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        msgspec.json.decode(body, type=CommonRequest)


def test_a_field_of_vllm_is_known_by_the_same_name_and_default():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for field in msgspec.structs.fields(CommonRequest):
        assert field.name in CompletionRequest.model_fields
        if not field.required:
            assert field.default == CompletionRequest.model_fields[field.name].default


def test_an_application_gets_the_short_way():
    from fastapi import FastAPI
    from vllm.entrypoints.openai.completion.api_router import attach_router, router

    from nezha_vllm.frontend.install import completions_route
    from nezha_vllm.frontend.short_way import shorten

    before = list(router.routes)
    shorten(completions_route())
    shorten(completions_route())
    assert router.routes == before
    app = FastAPI()
    attach_router(app)
    assert [route.path for route in app.routes if isinstance(route, CompletionsRoute)] == ["/v1/completions"]


class Client:
    """Stands where Starlette keeps a request: a client that leaves when told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_work_is_answered_while_the_client_waits():
    async def run() -> tuple[Any, int]:
        result = await unless_disconnected(Client(), asyncio.sleep(0.01, "done"))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return result, len(asyncio.all_tasks())

    assert asyncio.run(run()) == ("done", 1), "nothing watches on behind the answer"


def test_work_is_cancelled_when_the_client_leaves():
    async def run() -> tuple[Any, bool, int]:
        client, cancelled = Client(), []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        asyncio.get_running_loop().call_later(0.01, client.left.set)
        result = await unless_disconnected(client, work())  # type: ignore[arg-type]
        await asyncio.sleep(0.01)  # the task itself goes on uncancelled
        return result, cancelled == [True], asyncio.current_task().cancelling()  # type: ignore[union-attr]

    assert asyncio.run(run()) == (None, True, 0)


def test_errors_of_the_work_come_through():
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(unless_disconnected(Client(), fail()))  # type: ignore[arg-type]


def test_a_server_that_stops_is_not_taken_for_a_client_that_leaves():
    async def run() -> None:
        task = asyncio.create_task(unless_disconnected(Client(), asyncio.sleep(60)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
