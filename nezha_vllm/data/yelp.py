"""The Yelp data set: ``review.json`` and ``business.json``, JSON lines, under these or Yelp's longer names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nezha_vllm.data.json_files import keyed, read_objects, record
from nezha_vllm.data.lines import BrokenLines
from nezha_vllm.data.records import Interaction, ItemRecord
from nezha_vllm.data.times import seconds


class YelpReader:
    """Reads a folder. Items are businesses, interactions are reviews. Raises ``FileNotFoundError`` without reviews."""

    clock = True

    def __init__(self, folder: Path, max_broken: float = 0.01) -> None:
        reviews = _find(folder, "review.json")
        if reviews is None:
            raise FileNotFoundError(
                f"no review.json or yelp_academic_dataset_review.json in {folder}, plain or gzipped"
            )
        self.reviews, self.businesses = reviews, _find(folder, "business.json")
        self.broken = BrokenLines(max_broken)

    def interactions(self) -> Iterator[Interaction]:
        for number, row in read_objects(self.reviews, self.broken):
            try:
                yield Interaction(keyed(row, "user_id"), keyed(row, "business_id"), seconds(row.get("date")))
            except ValueError as error:
                self.broken.skip(self.reviews, number, str(error))

    def items(self) -> Iterator[ItemRecord]:
        if self.businesses is None:
            return
        for number, row in read_objects(self.businesses, self.broken):
            try:
                kept = {name: row.get(name) for name in ("name", "categories", "city", "state")}
                yield record(keyed(row, "business_id"), kept)
            except ValueError as error:
                self.broken.skip(self.businesses, number, str(error))


def _find(folder: Path, name: str) -> Path | None:
    names = (f"{stem}{name}{end}" for stem in ("", "yelp_academic_dataset_") for end in ("", ".gz"))
    return next((folder / file for file in names if (folder / file).is_file()), None)
