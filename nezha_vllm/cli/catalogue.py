"""Build catalogues, and publish them to a store that a server starts from.

  nezha catalogue build items.parquet --codebook-sizes 256,256,256 --out monday
  nezha catalogue publish store monday
  nezha catalogue diff store tuesday
  nezha catalogue status store
  nezha catalogue rollback store
  nezha catalogue verify store

A store is a folder of versions that never change and a pointer to the current one. Publishing checks a version
completely before it swaps the pointer. `nezha catalogue VERB --help` explains each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nezha_vllm.cli import catalogue_build, catalogue_report

SUMMARY = "build a catalogue from a table, publish it to a store, verify, compare and roll back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="catalogue_verb", required=True, metavar="VERB")

    def verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run_catalogue=run)
        return added

    catalogue_build.add_arguments(verb("build", catalogue_build.run, "make a catalogue from Parquet, Arrow or CSV"))

    publish = verb("publish", _publish, "check a catalogue completely and make it a store's current version")
    publish.add_argument("store", type=Path, metavar="STORE", help="folder of the store; made if it is not there")
    publish.add_argument("catalogue", type=Path, metavar="CATALOGUE", help="catalogue folder, or another store")
    publish.add_argument("--move", action="store_true", help="link instead of copying where possible, then remove it")
    publish.add_argument(
        "--max-lost",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the current version's items that may be missing (%(default)s)",
    )
    publish.add_argument("--force", action="store_true", help="do not compare items with the current version")
    publish.add_argument("--keep", type=int, default=3, metavar="N", help="old versions to keep (%(default)s)")

    rollback = verb("rollback", _rollback, "make the previous version current again")
    rollback.add_argument("store", type=Path, metavar="STORE")
    rollback.add_argument("--to", metavar="VERSION", help="this version instead of the previous one")

    for name, run, text in (
        ("verify", catalogue_report.verify, "check every file of a store or a catalogue folder"),
        ("status", catalogue_report.status, "print a store's pointer and versions"),
    ):
        report = verb(name, run, text)
        report.add_argument("folder", type=Path, metavar="STORE" if name == "status" else "STORE|CATALOGUE")
        if name == "verify":
            report.add_argument("--version", metavar="VERSION", help="only this version of a store")
        report.add_argument("--json", action="store_true", help="print JSON")

    diff = verb("diff", catalogue_report.diff, "items added, removed, moved, reweighted, regrouped from A to B")
    for name in "ab":
        diff.add_argument(
            name, metavar=name.upper(), help="catalogue folder, store (its current version) or STORE@VERSION"
        )
    diff.add_argument("--examples", type=int, default=5, metavar="N", help="item IDs to print of each (%(default)s)")
    diff.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    return arguments.run_catalogue(arguments)


def _publish(arguments: argparse.Namespace) -> int:
    from nezha_vllm.store import Store

    pointer, swapped = Store(arguments.store).publish(
        arguments.catalogue,
        move=arguments.move,
        max_lost=arguments.max_lost,
        force=arguments.force,
        keep=arguments.keep,
    )
    what = "is now current" if swapped else "was current already; nothing is changed"
    print(f"version {pointer.version} {what} (sequence {pointer.sequence}, previous {pointer.previous or 'none'})")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from nezha_vllm.store import Store

    pointer = Store(arguments.store).rollback(arguments.to)
    print(f"version {pointer.version} is current again (sequence {pointer.sequence}, previous {pointer.previous})")
    return 0
