"""JSON as people publish it: one object a line, or one object that holds everything; plain or gzipped."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nezha_vllm.data.lines import BrokenLines, read_lines
from nezha_vllm.data.recbole import identifier, item_record
from nezha_vllm.data.records import ItemRecord

WHOLE = ("inter.json", "item.json")  # names of the LETTER format's files, each one object


def is_whole(path: Path) -> bool:
    """Whether the file is one object, by its name."""
    return path.name.removesuffix(".gz").endswith(WHOLE)


def read_whole(path: Path, broken: BrokenLines) -> dict[str, Any]:
    """The file's one object. Raises ``ValueError``."""
    text = "\n".join(line for _, line in read_lines(path, broken))
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def read_objects(path: Path, broken: BrokenLines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object). Amazon's metadata of 2014 are Python literals, which are read as well."""
    for number, line in read_lines(path, broken):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)  # "\\d" in a title
                    row = ast.literal_eval(line)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                broken.skip(path, number, f"no JSON: {error}")
                continue
        if isinstance(row, dict):
            yield number, row
        else:
            broken.skip(path, number, "no JSON object")


def keyed(row: Mapping[str, Any], *names: str) -> str:
    """The user or item ID under the first of ``names`` that the row has. Raises ``ValueError``."""
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if found is None:
        raise ValueError(f"no {' or '.join(names)}")
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise ValueError(f"{names[0]} is {found!r}, no ID")
    return identifier(str(found))


def record(item_id: str, row: Mapping[str, Any]) -> ItemRecord:
    """An item from the rest of its row: lists stay lists of strings, everything else becomes a string."""
    plain = {
        name: [str(part) for part in value] if isinstance(value, list) else str(value)
        for name, value in row.items()
        if value is not None
    }
    return item_record(item_id, plain, lambda title: title)
