"""A job's input cut into parts: runs of rows of one row group, the same whenever they are counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

FOOTER_END = 8  # length of the footer and b"PAR1"


class InputError(ValueError):
    """The input cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Part:
    """``rows`` rows from ``first`` on, counted within the row group."""

    number: int
    path: str
    row_group: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}.parquet"

    def read(self, columns: Sequence[str]) -> pa.Table:
        return _read_row_group(self.path, self.row_group, tuple(columns)).slice(self.first, self.rows)


@lru_cache(maxsize=1)  # parts of one row group mostly follow each other
def _read_row_group(path: str, row_group: int, columns: tuple[str, ...]) -> pa.Table:
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=list(columns)).select(columns)


@dataclass(frozen=True)
class InputFile:
    """``footer`` is a hash of the part of the file that says where and how large all its columns are."""

    path: str
    row_groups: tuple[int, ...]
    footer: str

    @classmethod
    def examine(cls, path: Path) -> tuple[InputFile, pa.Schema]:
        """Raises ``InputError``."""
        try:
            with parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
                rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            with path.open("rb") as raw:
                raw.seek(-FOOTER_END, os.SEEK_END)
                size = int.from_bytes(raw.read(4), "little")
                raw.seek(-FOOTER_END - size, os.SEEK_END)
                footer = hashlib.sha256(raw.read(size)).hexdigest()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from error
        return cls(str(path.absolute()), rows, footer), schema.remove_metadata()


def find_files(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, folders as the ``*.parquet`` files in and below them. Raises ``InputError``."""
    found: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = (path for path in given.rglob("*.parquet") if not _is_hidden(path.relative_to(given)))
            files = sorted(below)
            if not files:
                raise InputError(f"{given} has no *.parquet file")
            found += files
        elif given.is_file():
            found.append(given)
        else:
            raise InputError(f"{given} is missing")
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise InputError(f"{twice} is named twice")
    return found


def examine(paths: Sequence[Path]) -> tuple[list[InputFile], pa.Schema]:
    """All files and the schema that they have in common. Raises ``InputError``."""
    examined = [InputFile.examine(path) for path in paths]
    if not examined:
        raise InputError("no input; name Parquet files or folders with *.parquet files")
    schema = examined[0][1]
    for file, other in examined:
        if other != schema:
            raise InputError(
                f"{file.path} has the columns {_text(other)}, {paths[0]} has {_text(schema)}; make them alike"
            )
    return [file for file, _ in examined], schema


def parts_of(files: Sequence[InputFile], rows_per_part: int) -> Iterator[Part]:
    number = 0
    for file in files:
        for row_group, rows in enumerate(file.row_groups):
            for first in range(0, rows, rows_per_part):
                yield Part(number, file.path, row_group, first, min(rows_per_part, rows - first))
                number += 1


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _text(schema: pa.Schema) -> dict[str, Any]:
    return {field.name: str(field.type) for field in schema}
