"""Tables of items with their titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from nezha_vllm.client import Item


def read_titles(catalogue: str | Path) -> dict[str, str]:
    """Titles by item ID from a catalogue folder; empty if it has no ``title`` column."""
    from nezha_vllm.catalogue import Catalogue

    items = Catalogue.load(catalogue).items
    if "title" not in items.column_names:
        return {}
    return dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))


def ranking(items: Sequence[Item], titles: Mapping[str, str], held_out: str | None = None) -> Table:
    """Rank, title, item ID and score; ``held_out`` is marked where it appears."""
    table = Table()
    marked = held_out in [item.item_id for item in items]
    table.add_column("rank", justify="right")
    if titles:
        table.add_column("title")
    table.add_column("item")
    table.add_column("semantic ID")
    table.add_column("score", justify="right")
    if marked:
        table.add_column("")
    for rank, item in enumerate(items, start=1):
        hit = item.item_id == held_out
        title = [titles.get(item.item_id) or "(no title)"] if titles else []
        mark = ["◀ watched next" if hit else ""] if marked else []
        semantic_id = "-".join(map(str, item.semantic_id))
        row = [str(rank), *title, item.item_id, semantic_id, f"{item.score:.2f}", *mark]
        table.add_row(*row, style="bold green" if hit else None)
    return table
