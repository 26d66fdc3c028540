"""A server under closed and open loop load; every answer is checked, what is refused must be refused clearly.

`python -m benchmarks.reliability.load --model DIR`

Closed loop with 1, 8, 64 and 256 clients, then new requests at twice the highest rate of answers seen there, then one
client until it is as fast as before: the time of recovery. Counts the requests that wait for a reply at once. Where the
server is started here, samples the memory of its processes, and between the loads that of the GPUs in
``CUDA_VISIBLE_DEVICES``. Exit status 1 if an answer was wrong or missing.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from benchmarks.reliability.clients import Tally
from benchmarks.reliability.crowd import Crowd
from benchmarks.reliability.processes import print_memory, resident_bytes, used_bytes
from benchmarks.reliability.start import parser, questions, split, started
from nezha_vllm.scrape import metrics_of

SAMPLE_SECONDS = 1.0


class Watch:
    """Samples of a server inside of the context: its processes every second, its GPUs where nothing is measured."""

    def __init__(self, url: str, group: int | None) -> None:
        self._url, self._group = url, group
        self._memory: list[dict[str, int]] = []
        self._before = metrics_of(url, timeout=30)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            if self._group is not None:
                self._memory.append(resident_bytes(self._group))

    def _look(self) -> None:
        if self._group is not None:
            self._memory.append(used_bytes(self._group))

    def part(self) -> str:
        """What the server says of the time since the last call. To be called when no load is on its way."""
        self._look()
        now = metrics_of(self._url, timeout=30)
        part, self._before = now.since(self._before), now
        p50, p99 = (1e3 * (part.quantile("nezha_request_seconds", share) or 0.0) for share in (0.5, 0.99))
        return f"  the server: p50 {p50:.0f}, p99 {p99:.0f} ms of those answered"

    def report(self) -> None:
        if self._memory:
            print_memory(self._memory)


def run(arguments: argparse.Namespace, crowd: Crowd, watch: Watch) -> int:
    """How much was wrong."""
    failures, loops = 0, {}
    for count in arguments.clients:
        loops[count] = tally = crowd.closed_loop(count, arguments.seconds)
        print(f"closed loop, {count} clients, {tally.seconds:.0f} s: {tally}")
        print(watch.part(), flush=True)
        failures += _failures(tally, allowed=("200",))
    rate = arguments.rate or 2 * max(tally.per_second for tally in loops.values())
    tally, last = crowd.open_loop(rate, arguments.burst)
    ended = time.monotonic() - last
    print(f"open loop, {rate:.0f} requests/s, {tally.seconds:.0f} s: {tally}")
    print(f"  at most {tally.most} waited for a reply at once, {tally.late:.2f} s behind the schedule")
    print(f"  last reply {ended:.1f} s after the end")
    failures += _failures(tally, allowed=("200", "429", "503"))
    usual = float(np.percentile(loops[min(loops)].answered, 99))
    recovery = crowd.recovery(usual, last)
    failures += recovery == math.inf
    print(f"  recovery {recovery:.1f} s after the end")
    print(watch.part(), flush=True)
    tally = crowd.closed_loop(min(loops), min(10.0, arguments.seconds))
    print(f"closed loop, {min(loops)} clients, behind it: {tally}")
    return failures + _failures(tally, allowed=("200",))


def _failures(tally: Tally, allowed: Sequence[str]) -> int:
    for problem in tally.problems[:3]:
        print(f"  wrong: {problem}")
    return len(tally.problems) + sum(count for name, count in tally.outcomes.items() if name not in allowed)


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with ExitStack() as stack:
        url, group, server = arguments.url, None, None
        asked = questions(arguments) if arguments.expect == "model" else None
        if url is None:
            server = stack.enter_context(started(arguments.model, vllm_args, arguments.dtype))
            url, group = server.url, server.process.pid
        asked = asked or questions(arguments, url=url)
        crowd = stack.enter_context(Crowd(url, asked, arguments.processes))
        crowd.closed_loop(max(arguments.clients), 3.0)  # warm-up
        with Watch(url, group) as watch:
            failures = run(arguments, crowd, watch)
        watch.report()
        if server is not None:
            server.wrong = failures
    return 1 if failures else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--url", help="a server of that checkpoint; without it one is started here")
    found.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256], help="default 1 8 64 256")
    found.add_argument("--processes", type=int, default=1, help="that the clients are spread over (%(default)s)")
    found.add_argument("--seconds", type=float, default=60.0, help="of each closed loop (default %(default)s)")
    found.add_argument("--burst", type=float, default=300.0, help="seconds of the open loop (default %(default)s)")
    found.add_argument("--rate", type=float, help="requests/s of the open loop; default: twice the most answers/s")
    found.add_argument(
        "--expect",
        choices=("model", "server"),
        default="model",
        help="the answers of transformers, or of the server itself before the load",
    )
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
