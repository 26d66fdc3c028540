"""`nezha catalogue build`: a table of items → a catalogue folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="FILE", help=".parquet, .arrow, .feather, .csv or .csv.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="catalogue folder to write or replace")
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--codebook-sizes", metavar="T", help="codes of each level: 256,256,256")
    sizes.add_argument("--like", type=Path, metavar="DIR", help="those of this catalogue or store")
    parser.add_argument("--item-id", default="item_id", metavar="COLUMN", help="column of item IDs (%(default)s)")
    parser.add_argument(
        "--codes",
        default="codes",
        metavar="COLUMNS",
        help="a column of lists, or a column of integers for each level: c1,c2,c3 (%(default)s)",
    )
    parser.add_argument(
        "--weight",
        metavar="COLUMN",
        help="order of items that share a semantic ID, largest first (weight, if there is one)",
    )
    parser.add_argument("--metadata", metavar="COLUMNS", help="columns to keep: title,year; '' for none (all others)")
    parser.add_argument(
        "--segments",
        default="",
        metavar="COLUMNS",
        help="sets of items that requests may ask for: in_stock,markets are columns of true and false, each a segment, "
        "or of lists of segments' names",
    )
    parser.add_argument(
        "--shared-ids",
        choices=("expand", "first", "round_robin"),
        help="how items that share a semantic ID come out: all of an ID before the next one's, one an ID, or in turn "
        "(the server's setting)",
    )
    parser.add_argument("--version", metavar="NAME", help="name of this state (12 digits of a hash of the content)")


def run(arguments: argparse.Namespace) -> int:
    from nezha_vllm.catalogue import MANIFEST
    from nezha_vllm.cli.tokenize import codebook_sizes
    from nezha_vllm.folders import check_replaceable
    from nezha_vllm.item_table import build
    from nezha_vllm.manifest import read_manifest
    from nezha_vllm.pointer import resolve

    check_replaceable(arguments.out, MANIFEST)
    if arguments.like is None:
        given = arguments.codebook_sizes
        sizes = codebook_sizes(given, given.count(",") + 1)
    else:
        sizes = read_manifest(resolve(arguments.like)[0])["codebook_sizes"]
    catalogue = build(
        arguments.table,
        sizes,
        item_id=arguments.item_id,
        codes=arguments.codes.split(","),
        weight=arguments.weight,
        metadata=None if arguments.metadata is None else [name for name in arguments.metadata.split(",") if name],
        segments=[name for name in arguments.segments.split(",") if name],
        shared_ids=arguments.shared_ids,
        version=arguments.version,
    )
    catalogue.save(arguments.out)
    print(
        f"catalogue {catalogue.version} of {catalogue.num_items:,} items on {catalogue.num_ids:,} semantic IDs of "
        f"sizes {sizes} -> {arguments.out}"
    )
    return 0
