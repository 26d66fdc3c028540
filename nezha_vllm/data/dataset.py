"""A prepared data set: users' item sequences in time order and the items' texts, as a folder of three files.

* ``sequences.parquet``: ``user_id`` (string), ``items`` (list of string, oldest first);
* ``items.parquet``: ``item_id``, ``title``, ``text`` (all that is textual, for features) and metadata columns;
* ``manifest.json``: format, name, counts, and how the folder was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nezha_vllm.data.records import ItemRecord, Reader
from nezha_vllm.data.sequences import Counts, InteractionLog, core, ordered
from nezha_vllm.folders import replacing

FORMAT = 1
MANIFEST, SEQUENCES, ITEMS = "manifest.json", "sequences.parquet", "items.parquet"
ITEM_COLUMNS = ("item_id", "title", "text")
_REMEDY = "make the folder anew with `nezha prepare`"


@dataclass(frozen=True)
class Split:
    """Leave-one-out: the last item tests, the one before validates, all before those train.

    The history that belongs to ``valid_target[i]`` is ``train[i]``; to ``test_target[i]`` it is
    ``train[i] + [valid_target[i]]``.
    """

    users: list[str]
    train: list[list[str]]
    valid_target: list[str]
    test_target: list[str]

    def history(self, part: str) -> list[list[str]]:
        """Histories of the ``valid`` or the ``test`` targets."""
        if part not in ("valid", "test"):
            raise ValueError(f"part must be 'valid' or 'test', got {part!r}")
        if part == "valid":
            return self.train
        return [[*items, last] for items, last in zip(self.train, self.valid_target, strict=True)]


@dataclass(frozen=True)
class Dataset:
    """``sequences[u]`` are the items of ``users[u]``, oldest first; ``items`` has one row an item."""

    name: str
    users: list[str]
    sequences: list[list[str]]
    items: pa.Table
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        return Counts(len(self.users), self.items.num_rows, sum(map(len, self.sequences)))

    @property
    def item_ids(self) -> list[str]:
        return self.items["item_id"].to_pylist()

    def leave_one_out(self) -> Split:
        """Split by time within each user; users with fewer than three items have nothing to learn and are left out."""
        long = [(user, items) for user, items in zip(self.users, self.sequences, strict=True) if len(items) >= 3]
        if not long:
            raise ValueError(f"data set {self.name}: no user has three items, so nothing can be held out")
        return Split(
            [user for user, _ in long],
            [items[:-2] for _, items in long],
            [items[-2] for _, items in long],
            [items[-1] for _, items in long],
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; it appears complete or not at all. Replaces only an earlier data set."""
        sequences = pa.table(
            {
                "user_id": pa.array(self.users, pa.string()),
                "items": pa.array(self.sequences, pa.list_(pa.string())),
            }
        )
        manifest = {"format": FORMAT, "name": self.name, "counts": self.counts._asdict(), **self.provenance}
        with replacing(folder, MANIFEST) as scratch:
            pq.write_table(sequences, scratch / SEQUENCES)
            pq.write_table(self.items, scratch / ITEMS)
            (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Dataset:
        """Read and check a folder. Raises ``FileNotFoundError`` or ``ValueError`` with the file and the remedy."""
        folder = Path(folder)
        for name in (MANIFEST, SEQUENCES, ITEMS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no prepared data set at {folder}: {name} is missing; {_REMEDY}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']} is not {FORMAT}, the one this version reads")
            sequences, items = pq.read_table(folder / SEQUENCES), pq.read_table(folder / ITEMS)
            provenance = {key: value for key, value in manifest.items() if key not in ("format", "name", "counts")}
            dataset = cls(
                manifest["name"], sequences["user_id"].to_pylist(), sequences["items"].to_pylist(), items, provenance
            )
            dataset._verify(Counts(**manifest["counts"]))
        except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"data set {folder} cannot be read: {error}; {_REMEDY}") from error
        return dataset

    def _verify(self, promised: Counts) -> None:
        missing = [name for name in ITEM_COLUMNS if name not in self.items.column_names]
        if missing:
            raise ValueError(f"{ITEMS} lacks the columns {', '.join(missing)}")
        if self.counts != promised:
            raise ValueError(f"{MANIFEST} promises {promised}, the files hold {self.counts}")
        known = set(self.item_ids)
        unknown = next((item for items in self.sequences for item in items if item not in known), None)
        if unknown is not None:
            raise ValueError(f"item {unknown!r} of {SEQUENCES} is not in {ITEMS}")


def prepare(
    reader: Reader,
    name: str,
    *,
    ties: str = "shuffle",
    seed: int = 0,
    min_per_user: int = 0,
    min_per_item: int = 0,
) -> Dataset:
    """Read, filter and order a data set. Items nobody met are left out; met items without a record get a bare one.

    Raises ``ValueError`` if too many lines are broken or nothing is left.
    """
    log = InteractionLog.collect(reader.interactions())
    kept_N = core(log, min_per_user, min_per_item)
    if not kept_N.any():
        raise ValueError(
            f"{name}: none of {len(kept_N):,} interactions is left with at least {min_per_user} a user and "
            f"{min_per_item} an item; ask for fewer"
        )
    users, sequences = ordered(log, kept_N, ties, seed)
    met = dict.fromkeys(log.item_ids[item] for item in sorted(set(log.item_N[kept_N].tolist())))
    records = {record.item_id: record for record in reader.items() if record.item_id in met}
    bare = {item_id: ItemRecord(item_id, item_id, "") for item_id in met if item_id not in records}
    provenance = {
        "ties": ties,
        "seed": seed,
        "min_per_user": min_per_user,
        "min_per_item": min_per_item,
        "items_without_record": len(bare),
        "broken_lines": reader.broken.skipped,
    }
    return Dataset(name, users, sequences, _item_table([*records.values(), *bare.values()]), provenance)


def _item_table(records: list[ItemRecord]) -> pa.Table:
    names = dict.fromkeys(name for record in records for name in record.metadata)
    columns: dict[str, Any] = {
        column: pa.array([getattr(record, column) for record in records], pa.string()) for column in ITEM_COLUMNS
    }
    columns |= {name: pa.array([record.metadata.get(name) for record in records]) for name in names}
    return pa.table(columns)
