"""Plain sequence files: one user a line, ``user item item …``, oldest first; plain or gzipped.

After a tab there may be as many gaps, the seconds since the user's previous interaction: items with a gap of 0 have no
order between them. Without gaps the file's order is the order in time. Items come from JSON lines beside it, each with
``item_id`` (or ``id``), ``title`` and whatever else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from nezha_vllm.data.lines import BrokenLines, read_lines
from nezha_vllm.data.recbole import identifier, item_record
from nezha_vllm.data.records import Interaction, ItemRecord


class SequenceReader:
    """Reads ``path`` and, if given, the items of ``item_file``. Raises ``FileNotFoundError`` if one is missing."""

    def __init__(self, path: Path, item_file: Path | None = None, max_broken: float = 0.01) -> None:
        for file in (path, item_file):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"no file {file}")
        self.path, self.item_file = path, item_file
        self.broken = BrokenLines(max_broken)

    def interactions(self) -> Iterator[Interaction]:
        for number, line in read_lines(self.path, self.broken):
            try:
                yield from _interactions(line)
            except ValueError as error:
                self.broken.skip(self.path, number, str(error))

    def items(self) -> Iterator[ItemRecord]:
        if self.item_file is None:
            return
        for number, line in read_lines(self.item_file, self.broken):
            try:
                yield _item(line)
            except ValueError as error:
                self.broken.skip(self.item_file, number, str(error))


def _interactions(line: str) -> list[Interaction]:
    """All of a user's interactions, or ``ValueError``: half a sequence would be another history."""
    sequence, tab, gap_text = line.partition("\t")
    user, *items = map(identifier, sequence.split())
    if not items:
        raise ValueError(f"user {user} has no items")
    times: list[float] = [float(position) for position in range(len(items))]
    if tab:
        gaps = [float(gap) for gap in gap_text.split()]
        if len(gaps) != len(items):
            raise ValueError(f"{len(gaps)} gaps for {len(items)} items")
        if not all(math.isfinite(gap) and gap >= 0 for gap in gaps):
            raise ValueError("a gap is negative or no number")
        times = list(accumulate(gaps))
    return [Interaction(user, item, time) for item, time in zip(items, times, strict=True)]


def _item(line: str) -> ItemRecord:
    row: dict[str, Any] = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    found = row.pop("item_id", None)
    found = row.pop("id", None) if found is None else found
    if not isinstance(found, (str, int)) or isinstance(found, bool):
        raise ValueError("no item_id")
    plain = {
        name: [str(part) for part in value] if isinstance(value, list) else str(value)
        for name, value in row.items()
        if value is not None
    }
    return item_record(identifier(str(found)), plain, lambda title: title)
