"""Beyond the limit a client is told at once to come back, whatever way its request would take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

pytest.importorskip("vllm")
from vllm.entrypoints.openai.completion.api_router import attach_router
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from nezha_vllm.frontend.admission import Admission
from nezha_vllm.frontend.checked_route import use
from nezha_vllm.frontend.install import completions_route
from nezha_vllm.frontend.outcome import Outcome
from nezha_vllm.frontend.short_way import CountedRoute, shorten


class Slow:
    """Stands where vLLM has its handler: answers when it is told to."""

    def __init__(self) -> None:
        self.go_on, self.begun = asyncio.Event(), 0

    async def create_completion(self, request: Any, raw_request: Any) -> CompletionResponse:
        self.begun += 1
        await self.go_on.wait()
        return CompletionResponse(model="nezha", choices=[], usage=UsageInfo())


def served(handler: Slow, admission: Admission) -> FastAPI:
    shorten(completions_route())
    app = FastAPI()
    attach_router(app)

    @app.post("/invocations")
    async def invocations(request: Request) -> CompletionResponse:
        return await handler.create_completion(None, request)

    use(app.routes[-1], CountedRoute)  # as `install` does with vLLM's
    app.state.openai_serving_completion, app.state.enable_server_load_tracking = handler, False
    app.state.nezha_short_way = SimpleNamespace(open=False, admission=admission)
    return app


def run(
    most: int,
    searches: int,
    test: Callable[[Slow, Callable[[], Awaitable[httpx.Response]]], Awaitable[None]],
    path: str = "/v1/completions",
) -> None:
    async def main() -> None:
        handler = Slow()
        transport = httpx.ASGITransport(served(handler, Admission(most, lambda: searches)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await test(handler, lambda: client.post(path, json={"prompt": "<item:1>"}))

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_more_requests_than_the_limit_are_turned_away_and_later_ones_answered(path: str) -> None:
    async def test(handler: Slow, ask: Callable[[], Any]) -> None:
        asked = [asyncio.create_task(ask()) for _ in range(2)]
        while handler.begun < 2:
            await asyncio.sleep(0)
        refused = await ask()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        error = refused.json()["error"]
        assert error == error | {"type": "ServiceUnavailableError", "param": None, "code": 503}
        assert "2 requests" in error["message"]
        handler.go_on.set()
        assert [(await answer).status_code for answer in [*asked, ask()]] == [200, 200, 200]

    run(2, 0, test, path)


@pytest.mark.parametrize(("most", "searches", "status"), [(8, 7, 200), (8, 8, 503), (0, 10_000, 200)])
def test_searches_of_streams_and_lists_of_prompts_count_too(most: int, searches: int, status: int) -> None:
    async def test(handler: Slow, ask: Callable[[], Any]) -> None:
        handler.go_on.set()
        assert (await ask()).status_code == status

    run(most, searches, test)


def test_prompts_count_from_the_moment_that_they_are_known() -> None:
    admission = Admission(4, lambda: 0)
    with admission.request(), admission.request():
        with admission.prompts(100) as first:
            assert first, "a list begins where one more request would"
            assert admission.full
            with admission.prompts(2) as second:
                assert not second
        assert not admission.full


def test_a_client_that_leaves_during_its_upload_is_no_failure() -> None:
    async def main() -> str:
        messages = iter([{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            pass

        outcome = Outcome(send)
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        await served(Slow(), Admission(1, lambda: 0))(scope, receive, outcome)
        return outcome.name

    assert asyncio.run(main()) == "disconnected"
