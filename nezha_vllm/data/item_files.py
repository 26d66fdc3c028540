"""Items beside interactions: JSON lines, the LETTER format's ``*.item.json``, CSV or Parquet, with an ID column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nezha_vllm.data.json_files import is_whole, keyed, read_objects, read_whole, record
from nezha_vllm.data.lines import BrokenLines
from nezha_vllm.data.records import ItemRecord
from nezha_vllm.data.table_files import is_table, read_rows

ID_COLUMNS = ("item_id", "id")


def read_items(
    path: Path, broken: BrokenLines, id_columns: tuple[str, ...] = ID_COLUMNS, offset: int = 0
) -> Iterator[ItemRecord]:
    """Items of a file; ``offset`` is added to their IDs, which must then be whole numbers."""
    for number, row in _rows(path, broken):
        try:
            item_id = keyed(row, *id_columns)
            if offset:
                item_id = str(int(item_id) + offset)
            yield record(item_id, {name: value for name, value in row.items() if name not in id_columns})
        except ValueError as error:
            broken.skip(path, number, str(error))


def _rows(path: Path, broken: BrokenLines) -> Iterator[tuple[int, dict[str, Any]]]:
    if is_table(path):
        yield from read_rows(path, broken)
    elif not is_whole(path):
        yield from read_objects(path, broken)
    else:
        for number, (key, value) in enumerate(read_whole(path, broken).items(), start=1):
            yield number, _fields(value) | {"item_id": key}


def _fields(value: object) -> dict:
    return value if isinstance(value, dict) else {"title": str(value)}
