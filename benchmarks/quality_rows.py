"""The quality rows as tables group them, and which of them belong to a plan."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality_plan import ALONE, CODES, CURVE, PARTS_OF_A_RUN, PLAIN, SHORT, Places, Plan, runs, variant_of
from nezha_vllm.ablations import LABELS

UNVERIFIED = "NEZHA-4, no verification"
OURS = LABELS["nezha"]
NO_TOKENS = ", no item tokens"  # as in the paper
NO_SCORES = ", no item scores"  # of models with item tokens
SHORT_HISTORIES = ", short histories"  # one token an item
TAUGHT = ", with teachers"  # of models
OVER_CATALOGUE = ", softmax over the catalogue"
PLANNED = {PLAIN: NO_TOKENS, CODES: NO_SCORES, SHORT: SHORT_HISTORIES}


@dataclass(frozen=True)
class Result:
    """A line of the results file; ``model``, with its epochs and whether it had teachers, is empty for baselines."""

    dataset: str
    model: str
    method: str
    seed: int
    run: str
    row: Mapping[str, str]

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Result:
        config = json.loads(row["config"] or "{}")
        model = ""
        if "family" in config:
            shape = f"{config['family']}, {config['layers']} layers of {config['hidden']}"
            planned = row["run"].split("/")
            model = planned[1] if len(planned) == PARTS_OF_A_RUN else shape
            model += f", {config['epochs']} epochs"  # one table never compares unequal budgets
            model += TAUGHT if config.get("teachers") else ""
        return cls(row["dataset"], model, _method(row, config), int(row["seed"]), row["run"], row)

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self.row["config"] or "{}")

    @property
    def group(self) -> tuple[str, str, str]:
        """Data set, model and method: what seeds are means of."""
        return self.dataset, self.model, self.method

    @property
    def data(self) -> tuple[str, str]:
        """Also by name: indexes of the same sequences are data sets of their own."""
        return self.dataset, self.row["data_hash"]

    @property
    def planned_method(self) -> str:
        """The method without what options of the plan made of it."""
        method = self.method
        for label in (OVER_CATALOGUE, *reversed(PLANNED.values())):  # in the order of _method, from its end
            method = method.removesuffix(label)
        return method + PLANNED.get(variant_of(self.run.split("/")[2]), "")

    @property
    def measures_beside(self) -> bool:
        """Whether it is a row of beam widths or of latency, which the main tables do not have."""
        return CURVE in self.run or ALONE in self.run

    def number(self, name: str) -> float | None:
        return float(self.row[name]) if self.row[name] else None


def _method(row: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Also by what a model was trained with; rows from before there was a choice have none of it."""
    name = UNVERIFIED if row["method"] == OURS and row["validity"] == "final" else row["method"]
    if "family" not in config:
        return name
    # a weight of 0 that validation chose is a result, not a variant; before there was one, the loss was another
    scored = config.get("item_loss") and "item_score_weight" in config
    name += NO_TOKENS if not config.get("item_tokens") else "" if scored else NO_SCORES
    name += SHORT_HISTORIES if config.get("item_tokens") and config.get("short_histories") else ""
    return name + (OVER_CATALOGUE if config.get("softmax") == "catalogue" else "")


def planned(paths: Sequence[Path]) -> set[str]:
    """Names of all runs of some plans."""
    nowhere = Places(Path(), Path(), Path())
    jobs = (job for path in paths for job in runs(Plan.load(path), nowhere))
    return {step.run for job in jobs for step in job.steps if step.run}


def read_all(path: Path) -> list[Result]:
    """Every line, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Result.of(row) for row in csv.DictReader(file)]


def read(path: Path, split: str = "test", only: Collection[str] | None = None) -> list[Result]:
    """Results of a split, one a data set, model, method and seed: the newest. ``only``: names of runs that count.

    Baselines hang on the data alone, and count whatever model they were measured beside. A model that baselines were
    measured beside has a row of its own before, which is the one that counts.
    """
    found = [one for one in read_all(path) if one.row["split"] == split and not one.measures_beside]
    if only is not None:
        data = {one.data for one in found if one.run in only}
        found = [one for one in found if one.run in only or (not one.model and one.data in data)]
    found.sort(key=lambda one: "-" not in one.run.rpartition("/")[2])
    return list({(*one.group, one.seed): one for one in found}.values())


def main_models(results: Sequence[Result]) -> dict[str, str]:
    """Data set → its model with most rows."""
    found: dict[str, Counter[str]] = {}
    for one in results:
        if one.model:  # no baselines
            found.setdefault(one.dataset, Counter())[one.model] += 1
    return {dataset: models.most_common(1)[0][0] for dataset, models in found.items()}


def mean(values: Sequence[float | None], digits: int = 4) -> str:
    """A dash where nothing is known."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "–"


def spread(values: Sequence[float | None]) -> str:
    """Mean (lowest – highest)."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known):
        return mean(values)
    return f"{fmean(known):.4f} ({min(known):.4f} – {max(known):.4f})"
