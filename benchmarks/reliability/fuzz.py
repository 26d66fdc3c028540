"""Requests that no client should send, by the ten thousand: the server answers 2xx or 4xx and lives on.

`python -m benchmarks.reliability.fuzz --model DIR --requests 100000`

Of twenty, twelve come from the grammar of prompts and options, five from the server's own OpenAPI description by way of
schemathesis, and three are bytes that were JSON once; those of the first two kinds are also mixed with each other.
Behind every round of requests a good one is asked, and must be answered as at first. Prints statuses, what was wrong,
and the memory of each process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from benchmarks.additional import with_nezha
from benchmarks.reliability.bad_input import Known
from benchmarks.reliability.fuzz_client import DAMAGED, GRAMMAR, OPENAPI, OTHERS, Client, Found, fuzz, good_answer
from benchmarks.reliability.processes import print_memory, resident_bytes
from benchmarks.reliability.start import bare_parser, split
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import Server, free_port

PARTS = (*[GRAMMAR] * 12, *[OPENAPI] * 4, *[DAMAGED] * 3, OTHERS)  # those of other routes take longest to make
ROUND = 100  # generated requests of one process between two looks at the memory
SEGMENTS = {"odd": 2, "in stock": 3}  # without every second, every third item
ITEMS = 500  # that prompts and rules are made of


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with tempfile.TemporaryDirectory(prefix="nezha-fuzz-") as folder:
        return run(arguments, vllm_args, Path(folder))


def run(arguments: argparse.Namespace, vllm_args: list[str], folder: Path) -> int:
    known = with_segments(arguments.model, folder / "catalogue")
    vllm_args = with_nezha(["--disable-uvicorn-access-log", *vllm_args], catalogue=str(folder / "catalogue"))
    port, log = free_port(), folder / "log.txt"
    with Server(arguments.model, port, arguments=vllm_args, log=log) as server:
        print(f"ready after {server.wait_until_ready(timeout=900):.0f} s", flush=True)
        found, memory = Found(), [resident_bytes(server.process.pid)]
        begun = told = time.monotonic()
        for part in rounds(port, known, arguments):
            found.add(part)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                memory.append(resident_bytes(server.process.pid))
                print(f"{found.requests:7} {dict(found.statuses)}, {len(found.problems)} problems", flush=True)
        seconds = time.monotonic() - begun
        memory.append(resident_bytes(server.process.pid))
        if arguments.keep_log:
            arguments.keep_log.write_text(log.read_text(errors="replace"))
    return report(found, seconds, memory)


def with_segments(model: Path, folder: Path) -> Known:
    """Save the checkpoint's catalogue with segments; returns what requests to it are made of."""
    own = Catalogue.load(model / "catalogue")
    ids = own.ids.to_pylist()
    segments = {name: np.arange(len(ids)) % step > 0 for name, step in SEGMENTS.items()}
    catalogue = Catalogue.build(ids, own.codes, own.codec.codebook_sizes, segments=segments)
    catalogue.save(folder)
    return known_of(model, catalogue)


def known_of(model: Path, catalogue: Catalogue) -> Known:
    """What requests to a server of the checkpoint with this catalogue are made of."""
    config = json.loads((model / "config.json").read_text())
    items = catalogue.ids.to_pylist()[:ITEMS]
    sizes = tuple(catalogue.codec.codebook_sizes)
    return Known(tuple(items), tuple(catalogue.segments.names), sizes, config["vocab_size"], config["max_beam_width"])


def rounds(port: int, known: Known, arguments: argparse.Namespace) -> Iterator[Found]:
    """What each round has found, as they come to an end."""
    expected = good_answer(Client(port, known), known)
    with ProcessPoolExecutor(arguments.clients, multiprocessing.get_context("spawn")) as pool:
        under_way: set[Future[Found]] = set()
        asked, seed = 0, arguments.seed
        while asked < arguments.requests or under_way:
            while len(under_way) < 2 * arguments.clients and asked < arguments.requests:
                under_way.add(pool.submit(fuzz, port, known, PARTS[seed % len(PARTS)], seed, ROUND, expected))
                seed += 1
            done = next(as_completed(under_way))
            under_way.remove(done)
            asked += done.result().requests
            yield done.result()


def report(found: Found, seconds: float, memory: Sequence[dict[str, int]]) -> int:
    print(f"{found.requests} requests in {seconds:.0f} s; statuses {dict(sorted(found.statuses.items()))}")
    for part, statuses in sorted(found.by_part.items()):
        print(f"  {part}: {dict(sorted(statuses.items()))}")
    print(f"{found.streams} streams, {found.items} items checked, {found.good} good requests answered as at first")
    print_memory(memory)
    kinds = Counter(problem.split(" <- ")[0] for problem in found.problems)
    print(
        f"{len(found.problems)} problems", *(f"  {count} times {kind}" for kind, count in kinds.most_common()), sep="\n"
    )
    for problem in found.problems[:20]:
        print(problem[:2_000])
    return 1 if found.problems else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = bare_parser(__doc__)
    found.add_argument("--requests", type=int, default=100_000, help="default %(default)s")
    found.add_argument("--clients", type=int, default=3, help="processes that ask (default %(default)s)")
    found.add_argument("--seed", type=int, default=0, help="of the first round of requests (default %(default)s)")
    found.add_argument("--keep-log", type=Path, metavar="FILE", help="where the server's log goes")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
