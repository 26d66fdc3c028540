"""A server under closed and open loop load; every answer is checked, what is refused must be refused clearly.

`python -m benchmarks.reliability.load --model DIR`

Closed loop with 1, 8, 64 and 256 clients, then new requests at twice the highest rate of answers seen there, then one
client until it is as fast as before: the time of recovery. Samples the requests that the server has under way and,
where the server is started here, the memory of its processes. Exit status 1 if an answer was wrong or missing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from benchmarks.reliability.clients import Clients, Tally, under_way
from benchmarks.reliability.processes import resident_bytes
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.start import parser, split, started
from nezha_vllm.scrape import ScrapeError, metrics_of


class Watch:
    """Samples of a server, one a second."""

    def __init__(self, url: str, group: int | None) -> None:
        self._url, self._group = url, group
        self._memory: list[dict[str, int]] = []
        self._under_way = 0.0
        self._before = metrics_of(url, timeout=30)

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(1.0)

    def _look(self) -> None:
        if self._group is not None:
            self._memory.append(resident_bytes(self._group))
        try:
            self._under_way = max(self._under_way, under_way(self._url))
        except ScrapeError as error:
            print(f"  {error}", flush=True)

    def part(self) -> str:
        """What the server says of the time since the last call."""
        now = metrics_of(self._url, timeout=30)
        part, most = now.since(self._before), self._under_way
        self._before, self._under_way = now, 0.0
        p50, p99 = (1e3 * (part.quantile("nezha_request_seconds", share) or 0.0) for share in (0.5, 0.99))
        return f"  the server: p50 {p50:.0f}, p99 {p99:.0f} ms of those answered; at most {most:.0f} in the engine"

    def report(self) -> None:
        for name in self._memory[-1] if self._memory else ():
            sizes = [sample[name] / 2**20 for sample in self._memory if name in sample]
            quarter = max(1, len(sizes) // 4)
            early, late = np.mean(sizes[quarter : 2 * quarter]), np.mean(sizes[-quarter:])
            print(f"{name}: {sizes[0]:.0f} MiB at first, {early:.0f} in the second quarter, ", end="")
            print(f"{late:.0f} in the last, {max(sizes):.0f} at most")


async def run(arguments: argparse.Namespace, url: str, group: int | None, questions: Questions) -> int:
    """Exit status."""
    async with Clients(url, questions) as clients:
        await clients.closed_loop(1, 3.0)  # warm-up
        watch = Watch(url, group)
        watching = asyncio.create_task(watch.run())
        failures, loops = 0, {}
        for count in arguments.clients:
            loops[count] = tally = await clients.closed_loop(count, arguments.seconds)
            print(f"closed loop, {count} clients, {tally.seconds:.0f} s: {tally}")
            print(watch.part(), flush=True)
            failures += _failures(tally, allowed=("200",))
        rate = arguments.rate or 2 * max(tally.per_second for tally in loops.values())
        tally, last = await clients.open_loop(rate, arguments.burst)
        ended = time.monotonic() - last
        print(f"open loop, {rate:.0f} requests/s, {tally.seconds:.0f} s: {tally}")
        print(f"  at most {tally.late:.2f} s behind the schedule; last reply {ended:.1f} s after the end")
        failures += _failures(tally, allowed=("200", "429", "503"))
        usual = float(np.percentile(loops[min(loops)].answered, 99))
        print(f"  recovery {await _recovery(clients, usual, last):.1f} s after the end")
        print(watch.part(), flush=True)
        tally = await clients.closed_loop(min(loops), min(10.0, arguments.seconds))
        print(f"closed loop, {min(loops)} clients, behind it: {tally}")
        failures += _failures(tally, allowed=("200",))
        watching.cancel()
    watch.report()
    return 1 if failures else 0


async def _recovery(clients: Clients, usual: float, last: float) -> float:
    """Seconds from the burst's last request until one alone takes no longer than ``usual`` again."""
    while True:
        tally, begun = Tally(), time.monotonic()
        if await clients.ask(tally) and tally.answered[0] <= usual:
            return max(0.0, begun - last)
        await asyncio.sleep(0.05)


def _failures(tally: Tally, allowed: Sequence[str]) -> int:
    for problem in tally.problems[:3]:
        print(f"  wrong: {problem}")
    return len(tally.problems) + sum(count for name, count in tally.outcomes.items() if name not in allowed)


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with ExitStack() as stack:
        url, group = arguments.url, None
        if url is None:
            server = stack.enter_context(started(arguments.model, vllm_args))
            url, group = server.url, server.process.pid
        asked = (arguments.model, arguments.histories, arguments.n)
        if arguments.expect == "model":
            questions = Questions.of_model(*asked)
        else:
            questions = Questions.of_server(url, *asked, arguments.tolerance)
        return asyncio.run(run(arguments, url, group, questions))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--url", help="a server of that checkpoint; without it one is started here")
    found.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256], help="default 1 8 64 256")
    found.add_argument("--seconds", type=float, default=60.0, help="of each closed loop (default %(default)s)")
    found.add_argument("--burst", type=float, default=300.0, help="seconds of the open loop (default %(default)s)")
    found.add_argument("--rate", type=float, help="requests/s of the open loop; default: twice the most answers/s")
    found.add_argument(
        "--expect",
        choices=("model", "server"),
        default="model",
        help="the answers of transformers in float32, or of the server itself before the load, as for bfloat16",
    )
    found.add_argument("--tolerance", type=float, default=0.1, help="on scores, with --expect server (%(default)s)")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
