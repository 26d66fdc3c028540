"""Interactions in a CSV, TSV or Parquet file with named columns, a row each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nezha_vllm.data.item_files import read_items
from nezha_vllm.data.json_files import keyed
from nezha_vllm.data.lines import BrokenLines
from nezha_vllm.data.records import Interaction, ItemRecord
from nezha_vllm.data.table_files import is_table, read_rows
from nezha_vllm.data.times import seconds


class TableReader:
    """Interactions in columns ``user``, ``item`` and ``time``; without a time column the file's order counts.

    Times are numbers, or dates and times of ISO 8601, in UTC where they name no zone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a column is missing (when read), or the name says no format.
    """

    def __init__(
        self,
        path: Path,
        item_file: Path | None = None,
        max_broken: float = 0.01,
        *,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
    ) -> None:
        for file in (path, item_file):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"no file {file}")
        if not is_table(path):
            raise ValueError(f"{path}: a table is a .parquet, .csv or .tsv file, the latter two may be gzipped")
        self.path, self.item_file, self.user, self.item, self.time = path, item_file, user, item, time
        self.broken = BrokenLines(max_broken)
        self.clock = time is not None

    def interactions(self) -> Iterator[Interaction]:
        columns = (self.user, self.item, *([self.time] if self.time else []))
        for number, row in read_rows(self.path, self.broken, columns):
            try:
                time = None if self.time is None else seconds(row[self.time])
                yield Interaction(keyed(row, self.user), keyed(row, self.item), time)
            except ValueError as error:
                self.broken.skip(self.path, number, str(error))

    def items(self) -> Iterator[ItemRecord]:
        if self.item_file is not None:
            yield from read_items(self.item_file, self.broken, (self.item, "item_id", "id"))
