"""What the size of a catalogue changes for a server: start, memory, requests of the same histories, and long rules.

    python -m benchmarks.catalogue_served --model DIR --catalogues DIR/catalogue build/large -- --api-server-count 4

Catalogues must have the items of the checkpoint's own, as random ones have. Each server answers every prompt once when
it is quiet, and every later answer is compared with that one.

It prints and writes no rows: its clients check every answer, at a thousand a second and process, so their latency is
for a comparison of its catalogues alone. Rows of a server with another catalogue are those of ``benchmarks.latency``
and ``throughput`` with ``-- --additional-config '{"nezha": {"catalogue": "/…/build/large"}}'``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.additional import with_nezha
from benchmarks.reliability.crowd import Crowd
from benchmarks.reliability.processes import file_bytes, used_bytes
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.start import parser, questions, split, started
from nezha_vllm.catalogue import Catalogue

LISTED = 10_000
JSON = {"Content-Type": "application/json"}


def measure(arguments: argparse.Namespace, catalogue: Path, vllm_args: Sequence[str]) -> int:
    """How many answers were wrong or missing."""
    print(f"{catalogue}:", flush=True)
    vllm_args, wrong = with_nezha(vllm_args, catalogue=str(catalogue.resolve())), 0
    with started(arguments.model, vllm_args, arguments.dtype) as server:
        group, asked = server.process.pid, questions(arguments, url=server.url)
        with Crowd(server.url, asked, arguments.processes) as crowd:
            crowd.closed_loop(max(arguments.clients), 3.0)  # warm-up
            for count in arguments.clients:
                tally = crowd.closed_loop(count, arguments.seconds)
                print(f"  {count} clients, K {asked.beam_width}, n {asked.n}: {tally}", flush=True)
                wrong += len(tally.problems) + sum(tally.outcomes.values()) - tally.outcomes["200"]
                print(*(f"    wrong: {problem}\n" for problem in tally.problems[:3]), end="")
        rule_costs(server.url, asked, Catalogue.load(arguments.model / "catalogue"))
        files = file_bytes(group)
        for name, size in used_bytes(group).items():
            print(f"  {name}: {size >> 20} MiB of its own, {files.get(name, 0) >> 20} MiB of files")
        server.wrong = wrong
    return wrong


def rule_costs(url: str, asked: Questions, catalogue: Catalogue, times: int = 100) -> None:
    """What one client waits for with a long list of items: the same one each time, and another each time.

    With one more, as long and of nothing but white space, it waits for what any body of that length costs.
    """
    rng, count = np.random.default_rng(0), min(LISTED, catalogue.num_items)
    lists = [catalogue.item_ids(rng.choice(catalogue.num_items, count, replace=False).tolist()) for _ in range(times)]
    plain = [asked.body(which) for which in range(len(asked.prompts))]
    sent = {"no rule": plain}
    for name in ("exclude_items", "allow_items"):
        for kind, which in (("the same", lists[:1]), ("new", lists)):
            options = [{name: which[number % len(which)]} for number in range(times)]
            bodies = [asked.body(number % len(plain), vllm_xargs=rules) for number, rules in enumerate(options)]
            sent[f"{count:,} in {name}, {kind} each time"] = bodies
    sent[f"no rule, {len(bodies[0]) >> 10} KiB of white space"] = [one.ljust(len(bodies[0])) for one in plain]
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    for name, bodies in sent.items():
        took = []
        for number in range(times):
            begun = time.perf_counter()
            connection.request("POST", "/v1/completions", bodies[number % len(bodies)], JSON)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            took.append(1e3 * (time.perf_counter() - begun))
        print(f"  1 client, {name}: p50 {np.median(took):.2f} ms, {len(bodies[0]) >> 10} KiB", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    found = parser(__doc__)
    found.add_argument("--catalogues", type=Path, nargs="+", required=True, metavar="DIR", help="a server for each")
    found.add_argument("--clients", type=int, nargs="+", default=[1, 64], help="default 1 64")
    found.add_argument("--processes", type=int, default=1, help="that the clients are spread over (%(default)s)")
    found.add_argument("--seconds", type=float, default=10.0, help="of each count of clients (default %(default)s)")
    arguments = found.parse_args(own)
    return 1 if sum([measure(arguments, catalogue, vllm_args) for catalogue in arguments.catalogues]) else 0


if __name__ == "__main__":
    begun = time.monotonic()
    status = main()
    print(f"{time.monotonic() - begun:.0f} s in all")
    sys.exit(status)
