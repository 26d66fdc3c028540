"""A process of a server is killed while clients ask: nobody gets a wrong answer, nobody waits for ever, and it ends.

`python -m benchmarks.reliability.kills --model DIR`

Each kind of process in turn, each time in a fresh server. Prints what became of the requests, the longest wait, how
long the server took to end, and with which status. Exit status 1 if an answer was wrong, somebody waited for more than
30 seconds, or a process was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence

from benchmarks.reliability.clients import Clients, Tally
from benchmarks.reliability.processes import processes
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.start import parser, questions, split, started
from nezha_vllm.server import Server

LONGEST = 30.0  # seconds that a client may wait, and the server may take to end


async def kill_under_load(server: Server, questions: Questions, victim: str, clients: int) -> tuple[Tally, float]:
    """What became of requests from a second before the kill until it had ended; the longest wait behind the kill."""
    tally, waits, ended = Tally(), [0.0], asyncio.Event()

    async def client(asking: Clients) -> None:
        while not ended.is_set():
            begun = time.monotonic()
            if not await asking.ask(tally):
                await asyncio.sleep(0.1)
            waits.append(time.monotonic() - begun)

    async with Clients(server.url, questions) as asking:
        tasks = [asyncio.create_task(client(asking)) for _ in range(clients)]
        await asyncio.sleep(1.0)
        waits.clear()
        os.kill(processes(server.process.pid)[victim], signal.SIGKILL)
        deadline = time.monotonic() + LONGEST
        while processes(server.process.pid) and time.monotonic() < deadline:
            server.process.poll()
            await asyncio.sleep(0.05)
        ended.set()
        await asyncio.gather(*tasks)
    return tally, max(waits)


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    asked = questions(arguments)
    failures = 0
    for victim in arguments.victims:
        more = ["--api-server-count", "2"] if victim.startswith("APIServer") else []
        with started(arguments.model, [*more, *vllm_args], arguments.dtype) as server:
            begun = time.monotonic()
            tally, longest = asyncio.run(kill_under_load(server, asked, victim, arguments.clients))
            seconds, left = time.monotonic() - begun - 1.0, processes(server.process.pid)
            status = server.process.poll()
            wrong = [problem for problem in tally.problems if not problem.startswith("status 5")]
            print(f"{victim} killed: {dict(tally.outcomes)}, {len(wrong)} wrong, longest wait {longest:.1f} s")
            print(f"  the server ended after {seconds:.1f} s with status {status}; left: {left or 'none'}", flush=True)
            server.wrong = len(wrong) + len(left) + (longest > LONGEST)
            failures += server.wrong
    return 1 if failures else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    kinds = ("EngineCore", "Worker", "APIServer_0", "vllm serve")
    found.add_argument("--victims", nargs="+", default=kinds, help="default: " + ", ".join(kinds))
    found.add_argument("--clients", type=int, default=8)
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
