"""Rows of CSV, TSV and Parquet files by column name."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nezha_vllm.arrow_rows import rows_of
from nezha_vllm.data.lines import BrokenLines, read_lines

Rows = Iterator[tuple[int, dict[str, Any]]]
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def is_table(path: Path) -> bool:
    """Whether it is CSV, TSV or Parquet, by its name."""
    name = path.name.removesuffix(".gz")
    return name.endswith((*SEPARATORS, ".parquet"))


def read_rows(path: Path, broken: BrokenLines, wanted: Sequence[str] | None = None) -> Rows:
    """Yield (line of a CSV or row of a Parquet file, from 1; values by column), of the ``wanted`` columns at least.

    Raises ``ValueError`` for a file without one of them.
    """
    rows = _parquet_rows(path, broken, wanted) if path.name.endswith(".parquet") else _csv_rows(path, broken, wanted)
    yield from rows
    broken.check()


def _check(path: Path, columns: Sequence[str], wanted: Sequence[str] | None) -> None:
    missing = [name for name in wanted or () if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}: "
            "name the right ones with --user-column, --item-column and --time-column"
        )


def _parquet_rows(path: Path, broken: BrokenLines, wanted: Sequence[str] | None) -> Rows:
    try:
        file, number = pq.ParquetFile(path), 0
        _check(path, file.schema_arrow.names, wanted)
        for batch in file.iter_batches(columns=list(wanted) if wanted else None):
            for row in rows_of(batch):
                number += 1
                broken.read += 1
                if isinstance(row, ValueError):
                    broken.skip(path, number, str(row))
                else:
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _csv_rows(path: Path, broken: BrokenLines, wanted: Sequence[str] | None) -> Rows:
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for number, line in read_lines(path, broken):
            at = number
            yield line.lstrip("\ufeff") + "\n" if number == 1 else line + "\n"

    suffix = Path(path.name.removesuffix(".gz")).suffix
    reader = csv.reader(lines(), delimiter=SEPARATORS[suffix], strict=True)
    header: list[str] | None = None
    while True:
        before = at
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # a quote that is not closed takes many lines with it
            broken.skipped += max(0, at - before - 1)
            broken.skip(path, before + 1, f"no CSV: {error}")
            continue
        if cells is None:
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            _check(path, header, wanted)
        elif len(cells) != len(header):
            broken.skipped += max(0, at - before - 1)
            broken.skip(path, at, f"{len(cells)} columns instead of {len(header)}")
        else:
            yield at, {name: cell.strip() or None for name, cell in zip(header, cells, strict=True)}
