"""A server under closed and open loop load; every answer is checked, what is refused must be refused clearly.

`python -m benchmarks.reliability.load --model DIR --seconds 300`

Closed loop with 1, 8, 64 and 256 clients, then new requests at twice the highest rate of answers seen there, then one
client until it is as fast as before: the time of recovery. Samples the requests that the server has under way and,
where the server is started here, the memory of its processes. Exit status 1 if an answer was wrong or missing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.reliability.clients import Clients, Tally
from benchmarks.reliability.processes import resident_bytes
from benchmarks.reliability.questions import Questions
from nezha_vllm.scrape import ScrapeError, metrics_of
from nezha_vllm.server import Server, free_port

UNDER_WAY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Watch:
    """Samples of a server, one a second."""

    def __init__(self, url: str, group: int | None) -> None:
        self._url, self._group = url, group
        self.memory: list[dict[str, int]] = []
        self.under_way: list[float] = []

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(1.0)

    def _look(self) -> None:
        if self._group is not None:
            self.memory.append(resident_bytes(self._group))
        try:
            scrape = metrics_of(self._url, timeout=30)
        except ScrapeError as error:
            print(f"  {error}", flush=True)
            return
        self.under_way.append(sum(scrape.total(name) or 0.0 for name in UNDER_WAY))

    def report(self) -> None:
        for name in self.memory[-1] if self.memory else ():
            sizes = [sample[name] / 2**20 for sample in self.memory if name in sample]
            quarter = max(1, len(sizes) // 4)
            early, late = np.mean(sizes[quarter : 2 * quarter]), np.mean(sizes[-quarter:])
            print(f"{name}: {sizes[0]:.0f} MiB at first, {early:.0f} in the second quarter, ", end="")
            print(f"{late:.0f} in the last, {max(sizes):.0f} at most")


async def run(arguments: argparse.Namespace, url: str, group: int | None, questions: Questions) -> int:
    watch = Watch(url, group)
    async with Clients(url, questions) as clients:
        await clients.closed_loop(1, 3.0)  # warm-up
        watching = asyncio.create_task(watch.run())
        failures, loops = 0, {}
        for count in arguments.clients:
            watch.under_way.clear()
            loops[count] = tally = await clients.closed_loop(count, arguments.seconds)
            print(f"closed loop, {count} clients, {tally.seconds:.0f} s: {tally}{_under_way(watch)}", flush=True)
            failures += _failures(tally, allowed=("200",))
        rate = arguments.rate or 2 * max(tally.per_second for tally in loops.values())
        watch.under_way.clear()
        tally, last = await clients.open_loop(rate, arguments.seconds)
        print(f"open loop, {rate:.0f} requests/s, {tally.seconds:.0f} s: {tally}{_under_way(watch)}; ", end="")
        print(
            f"at most {tally.late:.2f} s behind the schedule; last answer {time.monotonic() - last:.1f} s after the end"
        )
        failures += _failures(tally, allowed=("200", "429", "503"))
        usual = float(np.percentile(loops[min(loops)].answered, 99))
        print(f"recovery: {await _recovery(clients, usual, last):.1f} s after the end", flush=True)
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


def _under_way(watch: Watch) -> str:
    return f"; at most {max(watch.under_way):.0f} under way in the engine" if watch.under_way else ""


def main(argv: Sequence[str] | None = None) -> int:
    arguments, vllm_args = _parse(list(sys.argv[1:] if argv is None else argv))
    with ExitStack() as stack:
        url, group = arguments.url, None
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nezha-load-")))
            vllm_args = ["--dtype", "float32", "--disable-uvicorn-access-log", *vllm_args]
            server = Server(arguments.model, free_port(), arguments=vllm_args, log=folder / "log.txt")
            stack.enter_context(server)
            print(f"ready after {server.wait_until_ready(timeout=900):.0f} s", flush=True)
            url, group = server.url, server.process.pid
        if arguments.expect == "model":
            questions = Questions.of_model(arguments.model, arguments.histories, arguments.n)
        else:
            questions = Questions.of_server(url, arguments.model, arguments.histories, arguments.n, arguments.tolerance)
        return asyncio.run(run(arguments, url, group, questions))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything behind -- goes to vLLM: … -- --api-server-count 2",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint with a catalogue in it")
    parser.add_argument("--url", help="a server of that checkpoint; without it one is started here")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256], help="default 1 8 64 256")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each load (default %(default)s)")
    parser.add_argument(
        "--rate", type=float, help="requests/s of the open loop, instead of twice the measured answers/s"
    )
    parser.add_argument("--histories", type=int, default=64, help="different prompts (default %(default)s)")
    parser.add_argument("--n", type=int, default=10, help="items of an answer (default %(default)s)")
    parser.add_argument(
        "--expect",
        choices=("model", "server"),
        default="model",
        help="the answers of transformers in float32, or of the server itself before the load, as for bfloat16",
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="on scores, with --expect server (%(default)s)")
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


if __name__ == "__main__":
    sys.exit(main())
