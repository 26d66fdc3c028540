"""`nezha catalogue verify | status | diff`: what only reads, as text or JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue


def verify(arguments: argparse.Namespace) -> int:
    from nezha_vllm.catalogue import Catalogue, CatalogueError
    from nezha_vllm.pointer import VERSIONS, is_store
    from nezha_vllm.store import Store

    if is_store(arguments.folder) or Path(arguments.folder, VERSIONS).is_dir():
        problems = Store(arguments.folder).verify(arguments.version)
    elif arguments.version:
        raise CatalogueError(f"{arguments.folder} is no store, so --version names nothing in it")
    else:
        problems = {Catalogue.load(arguments.folder).version: None}
    if arguments.json:
        print(json.dumps(problems, indent=2))
    else:
        for version, problem in problems.items():
            print(f"{version}: {problem or 'whole'}")
    return 1 if any(problems.values()) else 0


def status(arguments: argparse.Namespace) -> int:
    from nezha_vllm.store import Store
    from nezha_vllm.store_status import status as status_of

    pointer, versions = status_of(Store(arguments.folder))
    if arguments.json:
        print(json.dumps({"pointer": asdict(pointer), "versions": [asdict(version) for version in versions]}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("version", "", "items", "semantic IDs", "MB", "age"):
        table.add_column(name, justify="left" if name in ("version", "") else "right")
    for found in versions:
        numbers = ["?" if number is None else f"{number:,}" for number in (found.items, found.semantic_ids)]
        table.add_row(found.version, found.role, *numbers, f"{found.bytes / 1e6:,.1f}", _age(found.age_seconds))
    console = Console()
    console.print(table)
    for found in versions:
        if found.problem:
            console.print(f"{found.version}: {found.problem}", soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"sequence {pointer.sequence}: {pointer.version} since {pointer.time}, before it {pointer.previous or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def diff(arguments: argparse.Namespace) -> int:
    from nezha_vllm.catalogue_diff import difference, examples

    old, new = _catalogue(arguments.a), _catalogue(arguments.b)
    found = difference(old, new)
    shown = {
        name: examples(old if name == "removed" else new, rows, arguments.examples)
        for name, rows in vars(found).items()
    }
    if arguments.json:
        sides: dict[str, Any] = {
            "a": {"version": old.version, "items": old.num_items},
            "b": {"version": new.version, "items": new.num_items},
        }
        print(json.dumps(sides | {"counts": found.counts, "examples": shown}, indent=2))
        return 0
    print(f"{old.version} ({old.num_items:,} items) -> {new.version} ({new.num_items:,} items)")
    for name, count in found.counts.items():
        more = ", …" if count > len(shown[name]) else ""
        print(f"{name + ':':12}{count:>12,}   {', '.join(shown[name])}{more if shown[name] else ''}")
    if old.version != new.version and not any(found.counts.values()):
        print("only metadata, codebook sizes, segments without items or the policy for shared IDs differ")
    return 0


def _catalogue(name: str) -> Catalogue:
    """A catalogue folder, a store, or STORE@VERSION."""
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.store import Store

    folder, at, version = name.rpartition("@")
    if at and not Path(name).exists():
        return Store(folder).load(version)
    return Catalogue.load(name)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
