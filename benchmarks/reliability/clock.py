"""The wall clock jumps while a server answers and follows its store; every answer is checked.

`python -m benchmarks.reliability.clock --model DIR`

The server runs under libfaketime (`pip install libfaketime`, or `--libfaketime FILE`), which moves its wall clock and
leaves the monotonic one alone, as a correction of the system's time does. Behind each jump a version is published: all
of it must be taken up. Exit status 1 if an answer was wrong or a swap did not come.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.additional import with_nezha
from benchmarks.reliability.clients import Clients, Tally
from benchmarks.reliability.questions import Questions
from benchmarks.reliability.start import parser, questions, split, started
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.scrape import metrics_of
from nezha_vllm.store import Store

JUMPS = ("+3600", "-3600", "+86400", "-31536000", "+0")  # seconds beside the true time
POLL, LONGEST = 0.5, 30.0


async def run(url: str, questions: Questions, store: Store, folders: Sequence[Path], clock: Path) -> tuple[Tally, int]:
    """What clients got, and how many publications were not taken up."""
    tally, missed, jumping = Tally(), 0, True

    async def client(clients: Clients) -> None:
        while jumping:
            await clients.ask(tally)

    async with Clients(url, questions) as clients:
        begun = time.monotonic()
        asking = [asyncio.create_task(client(clients)) for _ in range(4)]
        for number, jump in enumerate(JUMPS, start=1):
            await asyncio.sleep(2.0)
            clock.write_text(jump)
            jumped, published = time.monotonic(), store.publish(folders[number % 2], force=True)[0].version
            while not (there := await asyncio.to_thread(shown, url, published)) and time.monotonic() < jumped + LONGEST:
                await asyncio.sleep(0.1)
            missed += not there
            print(f"{jump:>10} s: taken up {'after' if there else 'NOT'} {time.monotonic() - jumped:.1f} s", flush=True)
        jumping = False
        await asyncio.gather(*asking)
        tally.seconds = time.monotonic() - begun
    return tally, missed


def shown(url: str, version: str) -> bool:
    return bool(metrics_of(url, 30).total("nezha_catalogue_info", version=version))


def main(argv: Sequence[str] | None = None) -> int:
    own, vllm_args = split(sys.argv[1:] if argv is None else argv)
    arguments = _parse(own)
    with tempfile.TemporaryDirectory(prefix="nezha-clock-") as name:
        folder, catalogue = Path(name), Catalogue.load(arguments.model / "catalogue")
        # the same items under two names
        catalogues = [replace(catalogue, version=name) for name in ("even", "odd")]
        folders = [folder / version.version for version in catalogues]
        for version, place in zip(catalogues, folders, strict=True):
            version.save(place)
        asked = questions(arguments, catalogues)
        store, clock = Store(folder / "store"), folder / "clock"
        store.publish(folders[0])
        clock.write_text("+0")
        os.environ |= {"LD_PRELOAD": str(arguments.libfaketime), "FAKETIME_TIMESTAMP_FILE": str(clock)}
        os.environ |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
        vllm_args = with_nezha(vllm_args, catalogue=str(store.folder), catalogue_poll_seconds=POLL)
        with started(arguments.model, vllm_args, arguments.dtype) as server:
            tally, missed = asyncio.run(run(server.url, asked, store, folders, clock))
            server.wrong = len(tally.problems) + missed + (set(tally.outcomes) != {"200"})
    print(f"{tally}; {missed} of {len(JUMPS)} publications not taken up")
    return 1 if server.wrong else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    found = parser(__doc__)
    spec = importlib.util.find_spec("libfaketime")
    there = spec and spec.origin and Path(spec.origin).with_name("vendor") / "libfaketime/src/libfaketime.so.1"
    found.add_argument("--libfaketime", type=Path, default=there, required=not there, metavar="FILE")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
