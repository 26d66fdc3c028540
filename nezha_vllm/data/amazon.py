"""Amazon reviews: 2014 and 2018 (``reviews_*.json.gz``, ``meta_*.json.gz``) and 2023 (``*.jsonl``, ``meta_*.jsonl``).

The fields are named differently each year and mean the same; every line says its own. Times become seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nezha_vllm.data.json_files import keyed, read_objects, record
from nezha_vllm.data.lines import BrokenLines
from nezha_vllm.data.records import Interaction, ItemRecord
from nezha_vllm.data.times import seconds

MILLISECONDS = 1e11  # seconds reach it in the year 5138
DESCRIPTION_WORDS = 100  # embedding models cut longer texts anyway


class AmazonReader:
    """Reads one category: its reviews and, if given, its metadata. Items of 2023 are parent ASINs."""

    clock = True

    def __init__(self, reviews: Path, meta: Path | None = None, max_broken: float = 0.01) -> None:
        for file in (reviews, meta):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"no file {file}")
        self.reviews, self.meta = reviews, meta
        self.broken = BrokenLines(max_broken)

    def interactions(self) -> Iterator[Interaction]:
        for number, row in read_objects(self.reviews, self.broken):
            try:
                user, item = keyed(row, "reviewerID", "user_id"), keyed(row, "parent_asin", "asin")
                time = seconds(row.get("unixReviewTime", row.get("timestamp")))
                yield Interaction(user, item, time / 1000 if time > MILLISECONDS else time)
            except ValueError as error:
                self.broken.skip(self.reviews, number, str(error))

    def items(self) -> Iterator[ItemRecord]:
        if self.meta is None:
            return
        for number, row in read_objects(self.meta, self.broken):
            try:
                yield record(keyed(row, "parent_asin", "asin"), _described(row))
            except ValueError as error:
                self.broken.skip(self.meta, number, str(error))


def _described(row: Mapping[str, Any]) -> dict[str, Any]:
    """Title, categories, brand and description; the year decides which field holds them."""
    categories = dict.fromkeys(_strings(row.get("category") or row.get("categories")))
    description = " ".join(" ".join(_strings(row.get("description"))).split()[:DESCRIPTION_WORDS])
    return {
        "title": row.get("title") or None,
        "categories": list(categories),
        "brand": row.get("brand") or row.get("store") or None,
        "description": description or None,
    }


def _strings(value: Any) -> list[str]:
    """All strings of nested lists, in order: the categories of 2014 are lists of paths."""
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) and value.strip() else []
