"""Clients that leave in the middle of a request, beside others whose answers are checked.

`python -m benchmarks.reliability.hangups --model DIR --count 1000`

They leave during their upload, while they wait, and while a stream comes; half of them with a reset. Behind them the
server must have nothing under way and no connection more than before. Prints what the server has counted and its
memory. Exit status 1 if an answer was wrong or something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.reliability.clients import Clients, Tally, under_way
from benchmarks.reliability.processes import processes, resident_bytes
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.start import parser, questions, split, started
from nezha_vllm.scrape import metrics_of

KINDS = ("upload", "wait", "stream")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


async def hang_up(url: str, questions: Questions, kind: str, rng: random.Random) -> None:
    """One request that its client leaves."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    which = rng.randrange(len(questions.prompts))
    body = questions.body(which, **({"stream": True} if kind == "stream" else {}))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    writer.write(request[: -rng.randrange(1, len(body))] if kind == "upload" else request)
    await writer.drain()
    if kind == "stream":
        await reader.read(rng.choice([12, 200, 1000]))
    else:
        await asyncio.sleep(rng.uniform(0, 0.02))
    if rng.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.close()


async def run(url: str, questions: Questions, count: int, at_once: int) -> tuple[Tally, float]:
    """What the others got, and how long it took until nothing was under way any more."""
    rng, tally, begun = random.Random(0), Tally(), time.monotonic()
    left = iter(range(count))
    leaving = True

    async def leaver() -> None:
        for number in left:
            await hang_up(url, questions, KINDS[number % len(KINDS)], rng)

    async def other(clients: Clients) -> None:
        while leaving:
            await clients.ask(tally)

    async with Clients(url, questions) as clients:
        others = [asyncio.create_task(other(clients)) for _ in range(2)]
        await asyncio.gather(*(leaver() for _ in range(at_once)))
        leaving = False
        await asyncio.gather(*others)
    tally.seconds = time.monotonic() - begun
    gone = time.monotonic()
    while await asyncio.to_thread(under_way, url) and time.monotonic() < gone + 30:
        await asyncio.sleep(0.1)
    return tally, time.monotonic() - gone


def open_files(group: int) -> int:
    return sum(len(list(Path(f"/proc/{number}/fd").iterdir())) for number in processes(group).values())


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    asked = questions(arguments)
    with started(arguments.model, vllm_args, arguments.dtype) as server:
        group = server.process.pid
        asyncio.run(run(server.url, asked, arguments.count // 10, arguments.at_once))  # warm-up
        before, memory, files = metrics_of(server.url, 30), resident_bytes(group), open_files(group)
        tally, idle = asyncio.run(run(server.url, asked, arguments.count, arguments.at_once))
        grown = {name: (size - memory[name]) >> 20 for name, size in resident_bytes(group).items()}
        counted = metrics_of(server.url, 30).since(before).by("nezha_requests_total", "outcome")
        more, tracebacks = open_files(group) - files, server.log.read_text(errors="replace").count("Traceback")
        wrong = len(tally.problems) + (set(tally.outcomes) != {"200"}) + (idle > 30) + (more > 10) + tracebacks
        server.wrong = wrong
    print(f"{arguments.count} clients left; others: {tally}")
    print(f"the server counts { {name: int(value) for name, value in counted.items() if value} }")
    print(f"nothing under way after {idle:.1f} s, {more} files open more, {tracebacks} tracebacks; MiB more: {grown}")
    return 1 if wrong else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--count", type=int, default=1000, help="clients that leave (default %(default)s)")
    found.add_argument("--at-once", type=int, default=8)
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
