"""A server under steady load while its catalogue is swapped again and again; every answer is checked.

`python -m benchmarks.reliability.soak --model DIR --seconds 300 --swap-every 5`

The versions differ in items and codes; each second publication is followed by a rollback. Prints how many answers came
of each version, what was wrong, latency in the second after a swap and otherwise, and the memory of each process.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.processes import print_memory, resident_bytes
from benchmarks.reliability.start import parser, split
from benchmarks.reliability.versions import Ranking, difference, rankings, versions_of
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import Server, free_port
from nezha_vllm.store import Store

NAMES = ("red", "green", "blue", "white")


@dataclass
class Soak:
    """What clients ask, what is right, and what became of it."""

    address: tuple[str, int]
    prompts: list[str]
    expected: dict[str, list[Ranking]]
    n: int
    answered: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # when it was asked, how long it took
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, seed: int, most: int) -> None:
        rng = random.Random(seed)
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        for _ in range(most):
            if self.stop.is_set():
                return
            which = rng.randrange(len(self.prompts))
            headers = {"Content-Type": "application/json"}
            if rng.random() < 0.2:
                headers["X-Session-ID"] = "vLLM's own handler"
            body = json.dumps({"prompt": self.prompts[which], "n": self.n})
            begun = time.monotonic()
            try:
                connection.request("POST", "/v1/completions", body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.problems.append(repr(error))
                connection.close()
                continue
            self.latencies.append((begun, time.monotonic() - begun))
            self._check(which, response.status, answer)

    def _check(self, which: int, status: int, answer: Any) -> None:
        if status != 200:
            self.problems.append(f"status {status}: {answer}")
            return
        versions = {choice["catalogue_version"] for choice in answer["choices"]}
        if len(versions) != 1 or not versions <= self.expected.keys():
            self.problems.append(f"an answer of versions {sorted(versions)}")
            return
        (version,) = versions
        found = [(choice["text"], choice["score"]) for choice in answer["choices"]]
        wrong = difference(found, self.expected[version][which])
        if wrong:
            self.problems.append(f"version {version}, prompt {which}: {wrong}")
        self.answered[version] += 1


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with tempfile.TemporaryDirectory(prefix="nezha-soak-") as folder:
        return run(arguments, vllm_args, Path(folder))


def run(arguments: argparse.Namespace, vllm_args: list[str], folder: Path) -> int:
    own = Catalogue.load(arguments.model / "catalogue")
    rng = random.Random(0)
    items = own.ids.to_pylist()
    histories = [rng.choices(items, k=rng.randint(1, 20)) for _ in range(arguments.histories)]
    versions = versions_of(own, NAMES, keep={item for history in histories for item in history})
    expected = rankings(arguments.model, versions, histories, arguments.n)
    store = Store(folder / "store")
    for version in versions:
        version.save(folder / version.version)
    store.publish(folder / NAMES[0])
    options = {"nezha": {"catalogue": str(store.folder), "catalogue_poll_seconds": arguments.poll}}
    vllm_args = ["--dtype", "float32", "--additional-config", json.dumps(options), *vllm_args]
    port, log = free_port(), folder / "log.txt"
    with Server(arguments.model, port, arguments=vllm_args, log=log) as server:
        print(f"ready after {server.wait_until_ready(timeout=900):.0f} s", flush=True)
        prompts = ["".join(f"<item:{item}>" for item in history) for history in histories]
        soak = Soak(("127.0.0.1", port), prompts, expected, arguments.n)
        each = -(-arguments.requests // arguments.clients)
        clients = [threading.Thread(target=soak.client, args=(seed, each)) for seed in range(arguments.clients)]
        for client in clients:
            client.start()
        swaps, memory = _swap_and_watch(arguments, store, folder, clients, server.process.pid)
        soak.stop.set()
        for client in clients:
            client.join()
        told = [line for line in log.read_text(errors="replace").splitlines() if "NEZHA: catalogue {" in line]
        if arguments.keep_log:
            arguments.keep_log.write_text(log.read_text(errors="replace"))
    return _report(soak, swaps, told, memory)


def _swap_and_watch(
    arguments: argparse.Namespace, store: Store, folder: Path, clients: Sequence[threading.Thread], group: int
) -> tuple[list[float], list[dict[str, int]]]:
    """Publish until the clients or the time are at an end; when that was, and memory before each time."""
    end, swaps, memory = time.monotonic() + arguments.seconds, [], [resident_bytes(group)]
    while any(client.is_alive() for client in clients) and time.monotonic() < end:
        time.sleep(arguments.swap_every)
        memory.append(resident_bytes(group))
        if len(swaps) % 3 == 2:
            pointer = store.rollback()
        else:
            pointer, _ = store.publish(folder / NAMES[(len(swaps) + 1) % len(NAMES)], force=True)
        swaps.append(time.monotonic())
        largest = ", ".join(f"{name} {size >> 20}" for name, size in memory[-1].items() if size > 50 << 20)
        print(f"{len(swaps):4} {pointer.version:6} MiB: {largest}", flush=True)
    time.sleep(min(arguments.swap_every, 5))
    return swaps, [*memory, resident_bytes(group)]


def _report(soak: Soak, swaps: Sequence[float], told: Sequence[str], memory: Sequence[dict[str, int]]) -> int:
    when, took = np.array(soak.latencies).T
    since = when - np.array([0.0, *swaps])[np.searchsorted(swaps, when)]
    near = since < 1.0
    results = Counter(json.loads(line[line.index("{") :])["result"] for line in told)
    print(f"{len(took)} requests, {dict(soak.answered)}; {len(soak.problems)} problems {soak.problems[:3]}")
    print(f"{len(swaps)} publications and rollbacks, of which the server says {dict(results)}")
    for name, part in (("in the second after one", took[near]), ("otherwise", took[~near])):
        if len(part):
            quantiles = np.percentile(part, [50, 99, 99.9]) * 1e3
            print(f"latency {name}: p50 {quantiles[0]:.1f}, p99 {quantiles[1]:.1f}, p99.9 {quantiles[2]:.1f} ms")
    print_memory(memory)
    return 1 if soak.problems or results["refused"] else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--requests", type=int, default=10**9, help="stop after so many")
    found.add_argument("--seconds", type=float, default=300.0, help="or after so long (default %(default)s)")
    found.add_argument("--swap-every", type=float, default=10.0, metavar="S", help="default %(default)s")
    found.add_argument("--poll", type=float, default=1.0, metavar="S", help="the server's (default %(default)s)")
    found.add_argument("--clients", type=int, default=4)
    found.add_argument("--keep-log", type=Path, metavar="FILE", help="where the server's log goes")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
