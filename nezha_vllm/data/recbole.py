"""RecBole's atomic files: ``NAME.inter`` and, where there is one, ``NAME.item``; tab-separated, plain or gzipped.

The first line names and types the columns, such as ``user_id:token<TAB>item_id:token<TAB>timestamp:float``. Types are
``token`` (an ID or a category), ``token_seq`` (several, separated by spaces), ``float`` and ``float_seq``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nezha_vllm.data.lines import BrokenLines, read_lines
from nezha_vllm.data.records import Interaction, ItemRecord

TYPES = ("token", "token_seq", "float", "float_seq")
# RecBole's data sets name the same thing differently; under the first name it reaches the catalogue.
COLUMN_ALIASES = {
    "title": ("title", "movie_title", "name", "item_name", "product_title"),
    "year": ("year", "release_year"),
    "genres": ("genres", "genre", "class", "categories", "category"),
}


class RecBoleReader:
    """Reads the one data set in ``folder``.

    Args:
        title_of: applied to every title; titles are text with single spaces.

    Raises:
        FileNotFoundError: no ``.inter`` file.
        ValueError: several of them, a header that cannot be read, or too many broken lines.
    """

    def __init__(
        self, folder: Path, max_broken: float = 0.01, title_of: Callable[[str], str] = lambda title: title
    ) -> None:
        self.interaction_file = _only_file(folder, ".inter")
        self.item_file = _item_file(self.interaction_file)
        self.title_of = title_of
        self.broken = BrokenLines(max_broken)
        self.clock = False

    def interactions(self) -> Iterator[Interaction]:
        path = self.interaction_file
        for line, row in _rows(path, self.broken, required=("user_id", "item_id")):
            self.clock = "timestamp" in row
            try:
                time = _time(row["timestamp"]) if self.clock else None
                yield Interaction(identifier(row["user_id"]), identifier(row["item_id"]), time)
            except ValueError as error:
                self.broken.skip(path, line, str(error))

    def items(self) -> Iterator[ItemRecord]:
        path = self.item_file
        if path is None:
            return
        for line, row in _rows(path, self.broken, required=("item_id",)):
            try:
                item_id = identifier(row.pop("item_id"))
                yield item_record(item_id, row, self.title_of)
            except ValueError as error:
                self.broken.skip(path, line, str(error))


def _rows(path: Path, broken: BrokenLines, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = read_lines(path, broken)
    _, header = next(lines, (1, ""))
    names, types = _columns(path, header, required)
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) != len(names):
            broken.skip(path, number, f"{len(cells)} columns instead of {len(names)}")
            continue
        yield (
            number,
            {
                name: cell.split() if kind.endswith("_seq") else cell.strip()
                for name, kind, cell in zip(names, types, cells, strict=True)
            },
        )


def _columns(path: Path, header: str, required: tuple[str, ...]) -> tuple[list[str], list[str]]:
    names, types = [], []
    for cell in header.lstrip("\ufeff").split("\t"):
        name, _, kind = cell.strip().rpartition(":")
        if not name or kind not in TYPES:
            raise ValueError(f"{path}:1: column {cell!r} is not NAME:TYPE with a type of {', '.join(TYPES)}")
        names.append(name)
        types.append(kind)
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(f"{path}:1: no column {', '.join(missing)}; it has {', '.join(names)}")
    return names, types


def identifier(cell: Any) -> str:
    """``cell`` if it can be a user or item ID, else ``ValueError``."""
    if not isinstance(cell, str) or not cell:
        raise ValueError("an empty user or item ID")
    if ">" in cell:
        raise ValueError(f"ID {cell!r} has a '>', which ends <item:ID> in prompts")
    return cell


def _time(cell: Any) -> float:
    try:
        time = float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"timestamp {cell!r} is not a number") from None
    if not math.isfinite(time):
        raise ValueError(f"timestamp {cell!r} is not finite")
    return time


def item_record(item_id: str, row: dict[str, Any], title_of: Callable[[str], str]) -> ItemRecord:
    """An item from columns of strings or lists of strings; ``COLUMN_ALIASES`` are known by name."""
    named = dict(row)
    for name, aliases in COLUMN_ALIASES.items():
        alias = next((alias for alias in aliases if alias in named), None)
        if alias is not None:
            named[name] = named.pop(alias)
    title = title_of(_plain(named.pop("title", ""))) or item_id
    year = str(named.pop("year", "")).strip()
    genres = named.pop("genres", [])
    genres = genres if isinstance(genres, list) else [genre.strip() for genre in genres.split(",") if genre.strip()]
    text = f"{title} ({year})." if year.isdecimal() else f"{title}."
    if genres:
        text += f" Genres: {', '.join(genres)}."
    text += "".join(f" {name}: {_plain(value)}." for name, value in named.items() if _plain(value))
    metadata = {"year": int(year) if year.isdecimal() else None, "genres": genres}
    return ItemRecord(item_id, title, text, metadata | {name: _plain(value) for name, value in named.items()})


def _plain(value: Any) -> str:
    return " ".join(value if isinstance(value, list) else str(value).split())


def _only_file(folder: Path, suffix: str) -> Path:
    found = sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"*{suffix}.gz")])
    if not found:
        raise FileNotFoundError(f"no *{suffix} file in {folder}; --recbole takes a folder of RecBole atomic files")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several data sets ({names}); put the wanted one into a folder of its own")
    return found[0]


def _item_file(interaction_file: Path) -> Path | None:
    stem = interaction_file.name.removesuffix(".gz").removesuffix(".inter")
    candidates = (interaction_file.with_name(stem + end) for end in (".item", ".item.gz"))
    return next((path for path in candidates if path.is_file()), None)
