"""Plain sequence files: one user a line, ``user item item …``, oldest first; plain or gzipped.

After a tab there may be as many gaps, the seconds since the user's previous interaction: items with a gap of 0 have no
order between them. Without gaps the file's order is the order in time. ``*.inter.json`` is the LETTER format: one JSON
object of lists, user → items. Items come from a file beside it, see ``item_files``, each with ``item_id`` (or ``id``),
``title`` and whatever else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from nezha_vllm.data.item_files import read_items
from nezha_vllm.data.json_files import is_whole, read_whole
from nezha_vllm.data.lines import BrokenLines, read_lines
from nezha_vllm.data.recbole import identifier
from nezha_vllm.data.records import Interaction, ItemRecord


class SequenceReader:
    """Reads ``path`` and, if given, the items of ``item_file``. Raises ``FileNotFoundError`` if one is missing.

    ``item_offset`` is added to the IDs of ``item_file``: often they count from 0 there and from 1 in the sequences.
    """

    clock = False  # gaps count from a user's first interaction

    def __init__(
        self, path: Path, item_file: Path | None = None, max_broken: float = 0.01, item_offset: int = 0
    ) -> None:
        for file in (path, item_file):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"no file {file}")
        self.path, self.item_file, self.item_offset = path, item_file, item_offset
        self.broken = BrokenLines(max_broken)

    def interactions(self) -> Iterator[Interaction]:
        for number, line in self._lines():
            try:
                yield from _interactions(line)
            except ValueError as error:
                self.broken.skip(self.path, number, str(error))

    def _lines(self) -> Iterator[tuple[int, str]]:
        if not is_whole(self.path):
            yield from read_lines(self.path, self.broken)
            return
        for number, (user, items) in enumerate(read_whole(self.path, self.broken).items(), start=1):
            if isinstance(items, list):
                yield number, " ".join(map(str, [user, *items]))
            else:
                self.broken.skip(self.path, number, f"the items of user {user} are no list")

    def items(self) -> Iterator[ItemRecord]:
        if self.item_file is not None:
            yield from read_items(self.item_file, self.broken, offset=self.item_offset)


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
