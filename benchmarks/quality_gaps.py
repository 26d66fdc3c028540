"""NEZHA minus each other method: paired intervals over users, from their ranks, or as they were kept.

Ranks stay with who has the data. What was made of them is kept beside the results file, so that whoever has only that
gets the same tables; it counts as long as the runs that it was made of are those of the tables.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality_rows import OURS, Result, main_models
from nezha_vllm.training.comparison import BASELINES
from nezha_vllm.training.metrics import gains, hits
from nezha_vllm.training.options import sasrec_seed
from nezha_vllm.training.results import load_ranks
from nezha_vllm.training.significance import Difference, paired_bootstrap

METRICS = {"Hit@5": (hits, 5), "Hit@10": (hits, 10), "NDCG@5": (gains, 5), "NDCG@10": (gains, 10)}
SASREC = BASELINES["sasrec"]
UNSEEDED = set(BASELINES.values()) - {SASREC}  # nothing is drawn in them
COLUMNS = ["dataset", "model", "method", "seeds", "metric", *Difference._fields, "runs"]


@dataclass(frozen=True)
class Gap:
    """Of a data set and model, on ``seeds`` seeds; ``by``: metric → difference; ``runs``: names of both sides' runs."""

    dataset: str
    model: str
    method: str
    seeds: int
    by: dict[str, Difference]
    runs: frozenset[str]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dataset, self.model, self.method


def kept_at(results: Path) -> Path:
    return results.with_name(f"{results.stem}-gaps.csv")


def gaps(results: Sequence[Result], ranks: Path | None, kept: Path) -> list[Gap]:
    """Of every model with NEZHA and every method beside it. With ``ranks`` they are made, and written to ``kept``.

    Baselines stand beside one model only, of which the data set has most rows, and SASRec beside its students. That
    model's NEZHA stands beside those of others that were trained for as many epochs.
    """
    known = {one.key: one for one in _read(kept) if one.runs <= {result.run for result in results}}
    made = {one.key: one for one in _made(results, ranks)} if ranks else {}
    for key, one in made.items():
        if key not in known or one.seeds >= known[key].seeds:
            known[key] = one
    if made:
        _write(kept, known.values())
    return list(known.values())


def _is_student(one: Result) -> bool:
    return any(sasrec_seed(teacher, one.seed) is not None for teacher in one.config.get("teachers", ()))


def _made(results: Sequence[Result], ranks: Path) -> Iterable[Gap]:
    sides: dict[tuple[str, str, str], dict[int, tuple[str, np.ndarray]]] = {}
    epochs = {one.group: one.config.get("epochs") for one in results}
    mains = main_models(results)
    students = {(one.dataset, one.model) for one in results if _is_student(one)}
    for one in results:
        path = ranks / f"{one.run.replace('/', '-')}.npz"
        if path.is_file():
            sides.setdefault(one.group, {})[one.seed] = one.run, load_ranks(path)[one.row["method"]]
    for (dataset, model, method), ours in sides.items():
        if method != OURS:
            continue
        first = mains[dataset]
        for (where, beside, other), theirs in sides.items():
            baseline = not beside and (model == first or (other == SASREC and (dataset, model) in students))
            if where == dataset and (beside == model or baseline) and other != OURS:
                yield from _gap(dataset, model, other, ours, theirs, once=other in UNSEEDED)
        main = dataset, first, OURS
        if model != first and main in sides and epochs[main] == epochs[dataset, model, method]:
            yield from _gap(dataset, model, f"{OURS} of {first}", ours, sides[main], once=False)


def _gap(dataset: str, model: str, method: str, ours: dict, theirs: dict, once: bool) -> Iterable[Gap]:
    """``once``: a baseline without seeds, which stands against all of ours."""
    seeds = sorted(ours) if once else sorted(ours.keys() & theirs)
    if not seeds:
        return
    pairs = [(ours[seed], next(iter(theirs.values())) if once else theirs[seed]) for seed in seeds]
    by = {}
    for name, (per_user, k) in METRICS.items():
        mine, other = (sum(per_user(side[1], k) for side in sides) / len(seeds) for sides in zip(*pairs, strict=True))
        by[name] = paired_bootstrap(mine, other)
    yield Gap(dataset, model, method, len(seeds), by, frozenset(side[0] for pair in pairs for side in pair))


def _read(path: Path) -> list[Gap]:
    found: dict[tuple[str, str, str], Gap] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                runs = frozenset(row["runs"].split())
                gap = Gap(row["dataset"], row["model"], row["method"], int(row["seeds"]), {}, runs)
                difference = Difference(*(float(row[name]) for name in Difference._fields))
                found.setdefault(gap.key, gap).by[row["metric"]] = difference
    return list(found.values())


def _write(path: Path, found: Iterable[Gap]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in sorted(found, key=lambda gap: gap.key):
            for name, gap in one.by.items():
                figures = [f"{value:.9f}" for value in gap]
                writer.writerow([*one.key, one.seeds, name, *figures, " ".join(sorted(one.runs))])
