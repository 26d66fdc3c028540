"""A server under steady load while its catalogue is swapped again and again; every answer is checked.

`python -m benchmarks.reliability.soak --model DIR --seconds 300 --swap-every 5`

The versions differ in items and codes, or are those of `--catalogues`, with the items of the checkpoint's own; each
second publication is followed by a rollback. A fifth of the requests goes to vLLM's own handler. Prints how many
answers came of each version, what was wrong, latency in the second after a swap and otherwise, and the memory of each
process, and of the GPUs in ``CUDA_VISIBLE_DEVICES`` before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.additional import with_nezha
from benchmarks.reliability.clients import Tally
from benchmarks.reliability.crowd import Crowd
from benchmarks.reliability.processes import print_memory, resident_bytes, used_bytes
from benchmarks.reliability.questions import Questions, some_histories
from benchmarks.reliability.start import parser, questions, split, started
from benchmarks.reliability.versions import versions_of
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.scrape import metrics_of
from nezha_vllm.store import Store

NAMES = ("red", "green", "blue", "white")
FOR_VLLM = 0.2  # of the requests go to vLLM's own handler


class Swaps(threading.Thread):
    """Publications and rollbacks until ``stop``: when each was, and the processes' memory before it."""

    def __init__(self, store: Store, folders: Sequence[Path], every: float, group: int) -> None:
        super().__init__()
        self._store, self._folders, self._every, self._group = store, folders, every, group
        self.stop = threading.Event()
        self.times: list[float] = []
        self.memory = [used_bytes(group)]
        self.failed: Exception | None = None

    def run(self) -> None:
        try:
            self._swap()
        except Exception as error:  # the soak's, which goes on without swaps and is no success
            self.failed = error

    def _swap(self) -> None:
        while not self.stop.wait(self._every):
            self.memory.append(resident_bytes(self._group))
            if len(self.times) % 3 == 2:
                pointer = self._store.rollback()
            else:
                folder = self._folders[(len(self.times) + 1) % len(self._folders)]
                pointer, _ = self._store.publish(folder, force=True)
            self.times.append(time.monotonic())
            largest = ", ".join(f"{name} {size >> 20}" for name, size in self.memory[-1].items() if size > 50 << 20)
            print(f"{len(self.times):4} {pointer.version:6} MiB: {largest}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with tempfile.TemporaryDirectory(prefix="nezha-soak-") as folder:
        return run(arguments, vllm_args, Path(folder))


def run(arguments: argparse.Namespace, vllm_args: list[str], folder: Path) -> int:
    store = Store(arguments.store or folder / "store")
    vllm_args = with_nezha(vllm_args, catalogue=str(store.folder), catalogue_poll_seconds=arguments.poll)
    asked, folders = None, arguments.catalogues
    if not folders:
        own = Catalogue.load(arguments.model / "catalogue")
        histories = some_histories(own, arguments.histories)
        versions = versions_of(own, NAMES, keep={item for history in histories for item in history})
        asked, folders = questions(arguments, versions), [folder / name for name in NAMES]
        for version, place in zip(versions, folders, strict=True):
            version.save(place)
    store.publish(folders[0], force=True)
    with started(arguments.model, vllm_args, arguments.dtype, arguments.keep_log) as server:
        asked = asked or _as_it_answers(arguments, server.url, store, folders)
        with Crowd(server.url, asked, arguments.processes, FOR_VLLM) as crowd:
            warm_up = crowd.closed_loop(arguments.clients, 3.0)
            swaps = Swaps(store, folders, arguments.swap_every, server.process.pid)
            swaps.start()
            try:
                tally = crowd.closed_loop(arguments.clients, arguments.seconds)
            finally:
                swaps.stop.set()
                swaps.join()
        time.sleep(min(arguments.swap_every, 5))
        memory = [*swaps.memory, used_bytes(server.process.pid)]
        told = [line for line in server.log.read_text(errors="replace").splitlines() if "NEZHA: catalogue {" in line]
        server.wrong = _report(Tally.of([warm_up, tally]), swaps.times, told, memory)
        if swaps.failed is not None:
            print(f"the publisher ended early: {swaps.failed!r}")
            server.wrong = 1
    return server.wrong


def _as_it_answers(arguments: argparse.Namespace, url: str, store: Store, folders: Sequence[Path]) -> Questions:
    """What a quiet server answers by each version, the first one last."""
    parts = []
    for folder in [*folders[1:], folders[0]]:
        version = store.publish(folder, force=True)[0].version
        deadline = time.monotonic() + 300
        while not metrics_of(url, timeout=30).total("nezha_catalogue_info", version=version):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not take up {version} in 300 s; its log says why")
            time.sleep(0.2)
        time.sleep(2 * arguments.poll)  # all API processes
        parts.append(questions(arguments, url=url))
    expected = {version: part.expected[version] for part in parts for version in part.expected}
    sure = {version: part.sure[version] for part in parts if part.sure for version in part.sure}
    found = replace(parts[0], expected=expected, sure=sure or None)
    assert len(found.expected) == len(folders), f"{len(folders)} catalogues answered as {list(found.expected)}"
    print(found.mistakable(), flush=True)
    return found


def _report(tally: Tally, swaps: Sequence[float], told: Sequence[str], memory: Sequence[dict[str, int]]) -> int:
    when, took = np.array(tally.asked), np.array(tally.answered)
    since = when - np.array([0.0, *swaps])[np.searchsorted(swaps, when)]
    near = since < 1.0
    lines = [json.loads(line[line.index("{") :]) for line in told]
    results = Counter(line["result"] for line in lines)
    print(f"{tally}, versions {dict(tally.versions)}")
    for problem in tally.problems[:5]:
        print(f"  wrong: {problem}")
    print(f"{len(swaps)} publications and rollbacks under load; the server says {dict(results)}", end="")
    seconds = [line["seconds"] for line in lines]
    print(f", after {np.median(seconds):.2f} s at the median, {max(seconds):.2f} at most" if seconds else "")
    for name, part in (("in the second after one", took[near]), ("otherwise", took[~near])):
        if len(part):
            quantiles = np.percentile(part, [50, 99, 99.9]) * 1e3
            print(f"latency {name}: p50 {quantiles[0]:.1f}, p99 {quantiles[1]:.1f}, p99.9 {quantiles[2]:.1f} ms")
    print_memory(memory)
    return 1 if tally.problems or set(tally.outcomes) != {"200"} or results["refused"] else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--seconds", type=float, default=300.0, help="how long (default %(default)s)")
    found.add_argument("--swap-every", type=float, default=10.0, metavar="S", help="default %(default)s")
    found.add_argument("--poll", type=float, default=1.0, metavar="S", help="the server's (default %(default)s)")
    found.add_argument("--clients", type=int, default=4)
    found.add_argument("--processes", type=int, default=1, help="that the clients are spread over (%(default)s)")
    found.add_argument("--catalogues", type=Path, nargs="+", metavar="DIR", help="expected is what each answers alone")
    found.add_argument("--store", type=Path, metavar="DIR", help="default: a temporary one")
    found.add_argument(
        "--keep-log", type=Path, metavar="FILE", help="where the server's log goes; else it stays after a problem only"
    )
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
