"""A prepared data set: users' item sequences in time order and the items' texts, as a folder of three files.

* ``sequences.parquet``: ``user_id`` (string), ``items`` (list of string, oldest first), and of a data set split by time
  ``valid_from`` and ``test_from``, how many of the items lie before the validation and the test period;
* ``items.parquet``: ``item_id``, ``title``, ``text`` (all that is textual, for features) and metadata columns;
* ``manifest.json``: format, name, counts, and how the folder was made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nezha_vllm.data.records import ItemRecord, Reader
from nezha_vllm.data.sequences import Counts, InteractionLog, core, ordered
from nezha_vllm.folders import replacing

FORMAT = 1
MANIFEST, SEQUENCES, ITEMS = "manifest.json", "sequences.parquet", "items.parquet"
ITEM_COLUMNS = ("item_id", "title", "text")
CUT_COLUMNS = ("valid_from", "test_from")
SPLITS = ("leave-one-out", "time")
_REMEDY = "make the folder anew with `nezha prepare`"


@dataclass(frozen=True)
class Split:
    """What trains, and one held-out item a user with the history before it, for validation and for the test.

    ``users`` are those of the test.
    """

    users: list[str]
    train: list[list[str]]
    valid_history: list[list[str]]
    valid_target: list[str]
    test_history: list[list[str]]
    test_target: list[str]

    def history(self, part: str) -> list[list[str]]:
        """Histories of the ``valid`` or the ``test`` targets."""
        return self.test_history if _checked(part) == "test" else self.valid_history

    def target(self, part: str) -> list[str]:
        """The ``valid`` or the ``test`` targets."""
        return self.test_target if _checked(part) == "test" else self.valid_target


def _checked(part: str) -> str:
    if part not in ("valid", "test"):
        raise ValueError(f"part must be 'valid' or 'test', got {part!r}")
    return part


@dataclass(frozen=True)
class Dataset:
    """``sequences[u]`` are the items of ``users[u]``, oldest first; ``items`` has one row an item.

    ``cuts[u]``, of a data set split by time, says how many of them lie before the validation and the test period.
    """

    name: str
    users: list[str]
    sequences: list[list[str]]
    items: pa.Table
    provenance: Mapping[str, Any] = field(default_factory=dict)
    cuts: list[tuple[int, int]] | None = None

    @property
    def counts(self) -> Counts:
        return Counts(len(self.users), self.items.num_rows, sum(map(len, self.sequences)))

    @property
    def item_ids(self) -> list[str]:
        return self.items["item_id"].to_pylist()

    def split(self) -> Split:
        """As ``nezha prepare --split`` chose."""
        return self.leave_one_out() if self.cuts is None else self.split_by_time(self.cuts)

    def split_by_time(self, cuts: Sequence[tuple[int, int]]) -> Split:
        """What lies before the validation period trains; held out is a user's first item in the period, if any.

        The histories of the test have the items of the validation period, too. Raises ``ValueError`` for an empty part.
        """
        rows = list(zip(self.users, self.sequences, cuts, strict=True))
        valid = [
            (items[:valid_from], items[valid_from])
            for _, items, (valid_from, test_from) in rows
            if 0 < valid_from < test_from
        ]
        test = [
            (user, items[:test_from], items[test_from])
            for user, items, (_, test_from) in rows
            if 0 < test_from < len(items)
        ]
        train = [items[:valid_from] for _, items, (valid_from, _) in rows if valid_from]
        if not (train and valid and test):
            raise ValueError(
                f"data set {self.name}: {len(train)} users train, {len(valid)} validate, {len(test)} test; "
                "choose other shares with `nezha prepare --split time --valid-share … --test-share …`"
            )
        return Split(
            [user for user, _, _ in test],
            train,
            [history for history, _ in valid],
            [target for _, target in valid],
            [history for _, history, _ in test],
            [target for _, _, target in test],
        )

    def leave_one_out(self) -> Split:
        """The last item of a user tests, the one before validates, all before those train.

        Users with fewer than three items have nothing to learn and are left out.
        """
        long = [(user, items) for user, items in zip(self.users, self.sequences, strict=True) if len(items) >= 3]
        if not long:
            raise ValueError(f"data set {self.name}: no user has three items, so nothing can be held out")
        train = [items[:-2] for _, items in long]
        return Split(
            [user for user, _ in long],
            train,
            train,
            [items[-2] for _, items in long],
            [items[:-1] for _, items in long],
            [items[-1] for _, items in long],
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; it appears complete or not at all. Replaces only an earlier data set."""
        columns: dict[str, Any] = {
            "user_id": pa.array(self.users, pa.string()),
            "items": pa.array(self.sequences, pa.list_(pa.string())),
        }
        if self.cuts is not None:
            columns |= {name: [cut[place] for cut in self.cuts] for place, name in enumerate(CUT_COLUMNS)}
        sequences = pa.table(columns)
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
            cuts = None
            if CUT_COLUMNS[0] in sequences.column_names:
                cuts = list(zip(*(sequences[name].to_pylist() for name in CUT_COLUMNS), strict=True))
            users, items_of_users = sequences["user_id"].to_pylist(), sequences["items"].to_pylist()
            dataset = cls(manifest["name"], users, items_of_users, items, provenance, cuts)
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
    since: float = -math.inf,
    until: float = math.inf,
    split: str = "leave-one-out",
    valid_share: float = 0.1,
    test_share: float = 0.1,
) -> Dataset:
    """Read, filter and order a data set. Items nobody met are left out; met items without a record get a bare one.

    Args:
        since, until: interactions at these times and between them are kept, before the k-core filter.
        split: one of ``SPLITS``; with ``time`` the last interactions of all test, those before them validate, by share.

    Raises ``ValueError`` if too many lines are broken, nothing is left, or times of users cannot be compared but must.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if min(valid_share, test_share) <= 0 or valid_share + test_share >= 1:
        raise ValueError(f"shares must be positive and leave something to train, got {valid_share} and {test_share}")
    log = InteractionLog.collect(reader.interactions())
    if not reader.clock and (split == "time" or since > -math.inf or until < math.inf):
        raise ValueError(f"{name} has no times that can be compared between users, so it cannot be cut by time")
    kept_N = core(log, min_per_user, min_per_item, (log.time_N >= since) & (log.time_N <= until))
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
        "split": split,
    }
    cuts = None
    if split == "time":
        starts = np.quantile(log.time_N[kept_N], [1 - valid_share - test_share, 1 - test_share])
        provenance |= {"valid_share": valid_share, "test_share": test_share, "periods_from": starts.tolist()}
        cuts = _cuts(log, kept_N, starts)
    if since > -math.inf or until < math.inf:
        provenance |= {"since": since, "until": until}
    return Dataset(name, users, sequences, _item_table([*records.values(), *bare.values()]), provenance, cuts)


def _cuts(log: InteractionLog, kept_N: np.ndarray, starts: np.ndarray) -> list[tuple[int, int]]:
    """How many kept interactions each user has before each start, users by number."""
    count = len(log.user_ids)
    before = [np.bincount(log.user_N[kept_N & (log.time_N < start)], minlength=count) for start in starts]
    left = np.bincount(log.user_N[kept_N], minlength=count) > 0
    return list(zip(*(counts[left].tolist() for counts in before), strict=True))


def _item_table(records: list[ItemRecord]) -> pa.Table:
    names = dict.fromkeys(name for record in records for name in record.metadata)
    columns: dict[str, Any] = {
        column: pa.array([getattr(record, column) for record in records], pa.string()) for column in ITEM_COLUMNS
    }
    columns |= {name: pa.array([record.metadata.get(name) for record in records]) for name in names}
    return pa.table(columns)
