"""A full process turns requests away in front of the application, and nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

pytest.importorskip("vllm")
from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.admission import Admission
from nezha_vllm.frontend.body_limit import MAX_BODY
from nezha_vllm.frontend.gate import put_in_front
from nezha_vllm.frontend.guard import authentication_middleware

PATHS = {"/v1/completions", "/invocations"}


class Unknown:
    """Somebody's own middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class Counted:
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def count(self, outcome: str, seconds: float) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    monkeypatch.setattr(metrics, "_active", found)
    return found


def application(*middlewares: Any, searches: int = 1, most: int = 1, root: str = "") -> FastAPI:
    """With the gate, and answers 200 to all that reach it."""
    app = FastAPI(root_path=root)

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def answer(path: str) -> str:
        return path

    for middleware, options in middlewares:
        app.add_middleware(middleware, **options)
    app.middleware_stack = app.build_middleware_stack()
    put_in_front(app, Admission(most, lambda: searches), PATHS)
    return app


def ask(
    app: FastAPI,
    path: str = "/v1/completions",
    method: str = "POST",
    messages: list[dict[str, Any]] | None = None,
    **headers: str,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body; what is left of ``messages`` was not read."""
    waiting = [{"type": "http.request", "body": b"{}"}] if messages is None else messages
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    if not sent:
        return 0, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part.get("body", b"") for part in sent[1:])


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_full_process_refuses_with_a_message_and_counts_it(path: str, counted: Counted) -> None:
    status, headers, body = ask(application(), path)
    assert (status, headers[b"retry-after"], headers[b"content-type"]) == (503, b"1", b"application/json")
    assert int(headers[b"content-length"]) == len(body)
    assert json.loads(body)["error"]["code"] == 503
    assert counted.outcomes == ["overloaded"]


@pytest.mark.parametrize(
    ("path", "method"),
    [("/health", "GET"), ("/metrics", "GET"), ("/v1/models", "GET"), ("/tokenize", "POST"), ("/v1/completions", "GET")],
)
def test_other_requests_reach_the_application(path: str, method: str, counted: Counted) -> None:
    assert ask(application(), path, method)[0] == 200
    assert counted.outcomes == []


@pytest.mark.parametrize(("searches", "most"), [(0, 1), (10_000, 0)])
def test_below_the_limit_and_without_one_all_are_let_in(searches: int, most: int) -> None:
    assert ask(application(searches=searches, most=most))[0] == 200


def test_a_root_path_is_no_part_of_the_route() -> None:
    assert ask(application(root="/shop"), "/shop/v1/completions")[0] == 503


def test_without_the_key_nobody_learns_that_the_server_is_full(counted: Counted) -> None:
    app = application((authentication_middleware(), {"tokens": ["secret"]}))
    assert ask(app)[0] == ask(app, authorization="Bearer guess")[0] == 401
    assert counted.outcomes == []
    assert ask(app, authorization="Bearer secret")[0] == 503


def test_a_browser_is_answered_by_the_application_which_knows_its_headers() -> None:
    app = application((CORSMiddleware, {"allow_origins": ["*"]}))
    status, headers, _ = ask(app, origin="https://shop.example")
    assert (status, headers[b"access-control-allow-origin"]) == (200, b"*")
    assert ask(app)[0] == 503


def test_somebodys_own_middleware_sees_every_request() -> None:
    assert ask(application((Unknown, {})))[0] == 200


def test_the_body_is_read_to_its_end_before_the_answer() -> None:
    messages = [{"type": "http.request", "body": b"x" * 1000, "more_body": more} for more in (True, True, False)]
    assert ask(application(), messages=messages)[0] == 503
    assert messages == []


def test_no_more_of_a_body_is_awaited_than_a_request_may_have() -> None:
    part = {"type": "http.request", "body": b"x" * (MAX_BODY // 2), "more_body": True}
    messages = [part] * 5
    assert ask(application(), messages=messages)[0] == 503
    assert len(messages) == 2


def test_a_client_that_leaves_during_its_upload_is_counted_as_such(counted: Counted) -> None:
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert ask(application(), messages=messages)[0] == 0
    assert counted.outcomes == ["disconnected"]


async def on_one_connection(requests: list[list[bytes]]) -> list[int]:
    """Statuses of requests that go to a real server over one connection, each in these parts."""
    config = uvicorn.Config(application(), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
    statuses = []
    for parts in requests:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
        statuses.append(int(head.split()[1]))
    writer.close()
    server.should_exit = True
    await running
    return statuses


@pytest.mark.parametrize("size", [2, 1000, 3 << 20, MAX_BODY + (2 << 20)])
def test_a_connection_goes_on_behind_a_refusal_whatever_was_uploaded(size: int) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: gate\r\nContent-Length: {size}\r\n".encode()
    body = b"x" * size
    split = [head + b"\r\n", body[: size // 2], body[size // 2 :]]
    last = [head + b"Connection: close\r\n\r\n" + body]
    other = [b"GET /health HTTP/1.1\r\nHost: gate\r\n\r\n"]
    assert asyncio.run(on_one_connection([split, other, [head + b"\r\n" + body], split])) == [503, 200, 503, 503]
    if size <= MAX_BODY:
        assert asyncio.run(on_one_connection([split, last])) == [503, 503]


def test_all_middlewares_of_vllm_are_known() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.api_server import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", "secret"])
    app = build_app(args, ("generate",))
    app.middleware_stack = application_itself = app.build_middleware_stack()
    put_in_front(app, Admission(1, lambda: 1), PATHS)
    assert app.middleware_stack is not application_itself
    assert ask(app)[0] == 401
    assert ask(app, authorization="Bearer secret")[0] == 503
