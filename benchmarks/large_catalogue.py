"""A large random catalogue: time, memory and bytes an item to build it and to load it as a server does.

    python -m benchmarks.large_catalogue 100000000 build/large --codes 512 512 512

Items 0 … with distinct semantic IDs, no titles. The folder stays: `benchmarks.catalogue_served` measures requests.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.apart import apart
from nezha_vllm.catalogue import Catalogue, load_keys
from nezha_vllm.hf.random_catalogue import random_catalogue
from nezha_vllm.store import Store


def build(folder: Path, items: int, sizes: list[int], seed: int) -> None:
    random_catalogue(items, sizes, seed).save(folder)


def publish(folder: Path, store: Path) -> None:
    Store(store).publish(folder)


def load(folder: Path) -> None:
    Catalogue.load(folder).rows([])  # makes the index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=int)
    parser.add_argument("folder", type=Path, help="of the catalogue; replaced if it is one")
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 512, 512], help="of each level (512 512 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="publish it there as well")
    arguments = parser.parse_args()
    steps: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("draw, build and write", build, (arguments.folder, arguments.items, arguments.codes, arguments.seed)),
        ("load all, as an API process", load, (arguments.folder,)),
        ("load the keys, as an engine", load_keys, (arguments.folder,)),
    ]
    if arguments.store:
        steps.append(("publish", publish, (arguments.folder, arguments.store)))
    for name, step, values in steps:
        seconds, memory = apart(step, *values)
        print(f"{arguments.items:,} items: {name:30} {seconds:7.2f} s {memory / 2**30:6.2f} GiB", flush=True)
    for path in sorted(arguments.folder.iterdir()):
        print(f"{path.name} {path.stat().st_size / arguments.items:.1f} bytes an item")


if __name__ == "__main__":
    main()
