"""The results file: one line a run, append-only CSV, safe for several processes at once."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nezha_vllm.training.metrics import UNRANKED

if TYPE_CHECKING:
    from nezha_vllm.data.dataset import Dataset
    from nezha_vllm.training.comparison import Comparison

METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10", "hit@500", "valid")


@dataclass(frozen=True)
class Run:
    """What is known of a run beside its figures. ``seconds`` is the time of ``method`` in the evaluation.

    ``config``: its training options, teachers without their folders, the device, a GPU's index if one was chosen, its
    latency if that was measured.
    ``run`` is a name of the user's, such as a plan's. ``validity`` is empty where there are no beams, and figures are
    where a method has none.
    """

    run: str
    date: str
    commit: str
    dataset: str
    data_hash: str
    ties: str
    split: str
    method: str
    config: str
    seed: int
    catalogue: str
    beam_width: int
    max_history: int
    exclude_history: bool
    validity: str
    targets: int
    items: int
    seconds: float


COLUMNS = [*(field.name for field in fields(Run)), *METRICS]


def append(path: str | os.PathLike[str], comparison: Comparison, dataset: Dataset, name: str = "") -> None:
    """Add one line for each method of ``comparison``, all under the run ``name``.

    Raises:
        ValueError: the file has other columns, so it is no results file or one of another version.
    """
    lines = []
    for method, figures in comparison.rows.items():
        settings = dict(comparison.options.get(method, {}))
        if "teachers" in settings:  # rows leave this machine: no paths of it
            settings["teachers"] = [Path(one).name for one in settings["teachers"]]
        run = Run(
            name,
            datetime.now(UTC).isoformat(timespec="seconds"),
            commit(),
            comparison.dataset,
            data_hash(dataset),
            f"{dataset.provenance.get('ties', '')} {dataset.provenance.get('seed', '')}".strip(),
            comparison.split,
            method,
            json.dumps(settings | _circumstances(comparison, method), sort_keys=True),
            int(settings.get("seed", 0)),
            comparison.catalogue_version,
            comparison.beam_width,
            comparison.max_history,
            comparison.exclude_history,
            comparison.validities.get(method, ""),
            comparison.targets,
            comparison.items,
            comparison.seconds.get(method, float("nan")),
        )
        lines.append([*asdict(run).values(), *(_cell(figures.get(metric)) for metric in METRICS)])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is not None and header != COLUMNS:
            raise ValueError(f"{path} has other columns than a results file of this version; name a new file")
        csv.writer(file, lineterminator="\n").writerows(lines if header else [COLUMNS, *lines])


def save_ranks(path: str | os.PathLike[str], comparison: Comparison) -> None:
    """Every user's rank by method, int32, -1 for none: what paired intervals between runs are made of."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks: dict[str, Any] = {
        name: np.where(found == UNRANKED, -1, found).astype(np.int32) for name, found in comparison.ranks.items()
    }
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    with open(scratch, "wb") as file:
        np.savez_compressed(file, **ranks)
    scratch.replace(path)


def load_ranks(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Method → ranks, as in ``Comparison``."""
    with np.load(path) as stored:
        return {name: np.where(stored[name] < 0, UNRANKED, stored[name].astype(np.int64)) for name in stored.files}


def _circumstances(comparison: Comparison, method: str) -> dict[str, Any]:
    """The device, which GPU of the machine where one was chosen, and the method's latency if it was measured."""
    found = {
        "device": comparison.device,
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "latency": comparison.latency.get(method),
    }
    return {name: value for name, value in found.items() if value}


def _cell(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.6f}"


def data_hash(dataset: Dataset) -> str:
    """Twelve hex digits of the sequences: equal if and only if users, items, their order and a split by time are."""
    digest = hashlib.sha256()
    for user, items in zip(dataset.users, dataset.sequences, strict=True):
        digest.update(json.dumps([user, items]).encode())
    if dataset.cuts is not None:
        digest.update(json.dumps(dataset.cuts).encode())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit of the source, with ``+`` if it was changed since; where it is no git checkout, ``NEZHA_COMMIT``."""
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NEZHA_COMMIT", "")
