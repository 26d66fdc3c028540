"""A plan of quality runs, data set × model × method × seed, as jobs of ``nezha`` commands.

Everything a row depends on, but for the commit, is hashed into the name of its run, and files lie under that name: a
changed plan makes new runs beside the old ones, an unchanged one finds what it made.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS_OF_A_RUN = 5  # data set, model, method, seed, hash
CURVE = "-beam-"  # in the names of the runs that make a curve
ALONE = "-alone"  # in the names of the runs that measure latency
PLAIN, CODES = "-plain", "-codes"  # as in the paper, without item tokens; with them, but by the codes alone
SHORT = "-short"  # with one token an item in histories
VARIANTS = {PLAIN: ["--item-tokens", "0"], CODES: ["--item-loss", "0"], SHORT: ["--short-histories"]}
METHODS = ("nezha", "nezha-1", "nezha-2", "nezha-3", "nezha-4", "mtp", "ar")
METHODS += tuple(method + variant for method in ("nezha", "ar") for variant in VARIANTS)
SUBSET = ("datasets", "models", "methods", "seeds")
TABLES = {"datasets": ("prepare", "tokenize", "train"), "models": ("train",)}
MODEL = "{model:"
TEACHER = re.compile(r"\{model:(.+)\}")


@dataclass(frozen=True)
class Step:
    """One ``nezha`` command. Done is what left the file ``made``, or a line of ``run`` in the results file."""

    words: list[str]
    made: Path | None = None
    run: str = ""


@dataclass(frozen=True)
class Job:
    """Steps in their order; ``after``: jobs that make what this one reads; ``alone``: nothing runs beside it."""

    name: str
    steps: list[Step]
    after: tuple[str, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """``datasets`` and ``models``: name → arguments of each verb. ``{data}`` is the folder of the raw files,
    ``{model:NAME}``, once in a model's, the checkpoint of a model before it, of the same data set, method and seed.

    ``by_method``: what a method is trained with besides, or instead. ``order``: what is run first, next and so on,
    each a table of some ``datasets``, ``models``, ``methods`` and ``seeds``, all where it names none; without it
    everything, seed by seed. ``curve``: beam widths at which NEZHA of the first model and seed is measured too, with
    either validity. ``alone``: so many users are asked one at a time, with nothing else on the machine, by every
    decoding of the first model and seed.
    """

    datasets: dict[str, dict[str, list[str]]]
    models: dict[str, dict[str, list[str]]]
    methods: list[str]
    seeds: list[int]
    train: list[str] = field(default_factory=list)
    by_method: dict[str, list[str]] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    order: list[dict[str, list]] = field(default_factory=lambda: [{}])
    curve: list[int] = field(default_factory=list)
    alone: int = 0

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises ``ValueError`` naming what is wrong."""
        with path.open("rb") as file:
            try:
                raw = tomllib.load(file)
                plan = cls(**raw)
            except (tomllib.TOMLDecodeError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from None
        unknown = [method for method in plan.methods if method not in METHODS]
        if unknown or not plan.methods or not plan.seeds:
            raise ValueError(
                f"{path}: methods are some of {', '.join(METHODS)}, not {unknown}; and there must be seeds"
            )
        trained = {_trained_as(method) for method in plan.methods}
        if strange := sorted(set(plan.by_method) - trained):
            raise ValueError(f"{path}: by_method has {strange}, the plan trains {sorted(trained)}")
        for table, verbs in TABLES.items():
            for name, arguments in getattr(plan, table).items():
                if strange := sorted(set(arguments) - set(verbs)):
                    raise ValueError(f"{path}: {table}.{name} has {strange}, known are {list(verbs)}")
        for where, words in plan._words().items():
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError(f"{path}: {where} is {words}, must be a list of texts")
        plan._check_teachers(path)
        for subset in plan.order:
            for key, names in subset.items():
                if key not in SUBSET or not set(names) <= set(getattr(plan, key)):
                    raise ValueError(f"{path}: order has {key} = {names}, which the plan does not have")
        return plan

    def _check_teachers(self, path: Path) -> None:
        before = list[str]()
        for name, arguments in self.models.items():
            words = [word for word in arguments.get("train", []) if MODEL in word]
            known = [TEACHER.fullmatch(word) for word in words]
            if len(words) > 1 or not all(found and found[1] in before for found in known):
                raise ValueError(f"{path}: models.{name} has {words}, may have one {MODEL}NAME}} of a model before it")
            before.append(name)
        for where, words in self._words().items():
            if not where.startswith("models.") and any(MODEL in word for word in words):
                raise ValueError(f"{path}: {where} has {MODEL}…}}, which has a meaning among a model's alone")

    def _words(self) -> dict[str, list[str]]:
        """All arguments of commands, by where they stand."""
        found = {"train": self.train, "evaluate": self.evaluate}
        found |= {f"by_method.{method}": words for method, words in self.by_method.items()}
        for table in TABLES:
            for name, verbs in getattr(self, table).items():
                found |= {f"{table}.{name}.{verb}": words for verb, words in verbs.items()}
        return found


@dataclass(frozen=True)
class Places:
    """``data``: raw files; ``work``: everything made; ``results``: the CSV."""

    data: Path
    work: Path
    results: Path

    def fill(self, words: list[str]) -> list[str]:
        return [word.replace("{data}", str(self.data)) for word in words]


def preparations(plan: Plan, places: Places) -> list[Job]:
    """One job a data set: its sequences and its catalogue."""
    jobs = []
    for name in plan.datasets:
        dataset, catalogue = _dataset(plan, places, name)
        spec = plan.datasets[name]
        prepare = ["prepare", *places.fill(spec["prepare"]), "--name", name, "--out", str(dataset)]
        tokenize = ["tokenize", str(dataset), *places.fill(spec.get("tokenize", [])), "--out", str(catalogue)]
        steps = [Step(prepare, dataset / "manifest.json"), Step(tokenize, catalogue / "manifest.json")]
        jobs.append(Job(f"{name}: data", steps))
    return jobs


def runs(plan: Plan, places: Places) -> list[Job]:
    """One job a model: its training and evaluation. NEZHA-4 is an evaluation of NEZHA's checkpoint.

    Baselines are a job behind the model that they are measured with, beam widths come behind all models, latencies
    last of all. Models are in the plan's order; of each subset all data sets come with the first seed, then all with
    the second, so that a plan that is stopped early still compares.
    """
    wanted: dict[tuple, None] = {}
    for subset in plan.order:
        datasets, models, methods, seeds = (subset.get(key, list(getattr(plan, key))) for key in SUBSET)
        for seed, dataset, model, method in itertools.product(seeds, datasets, models, methods):
            if method != "nezha-4" or "nezha" not in plan.methods:
                wanted[dataset, model, method, seed] = None
    found = [_run(plan, places, *one) for one in wanted]
    parts = slice(2), slice(2, 3), slice(3, 4)
    return [job for part in parts for jobs in found for job in jobs[part] if job.steps]


def _run(plan: Plan, places: Places, dataset: str, model: str, method: str, seed: int) -> list[Job]:
    """The model's job, what is measured beside it if anything, in the third place its beam widths, then latencies.

    All but the first wait for it, whose rows are safe by then; where a checkpoint is gone they train it again.
    """
    folder, _ = _dataset(plan, places, dataset)
    trained = _trained_as(method)
    name, checkpoint, train, taught_by = _trained(plan, places, dataset, model, trained, seed)

    def evaluate(run: str, *more: str) -> Step:
        ranks = places.work / "ranks" / f"{run.replace('/', '-')}.npz"
        where = ["--results", str(places.results), "--run", run, "--ranks", str(ranks), "--seed", str(seed)]
        out = ["--json", str(checkpoint.parent / f"{run.split('/')[-1]}.json")]
        return Step(["evaluate", str(checkpoint), str(folder), *plan.evaluate, *where, *out, *more], run=run)

    steps = [*train]
    if method != "nezha-4":
        steps.append(evaluate(name, "--baselines"))
    if trained == "nezha" and "nezha-4" in plan.methods:
        steps.append(evaluate(f"{name}-final", "--validity", "final", "--baselines"))
    first = model == next(iter(plan.models))
    # baselines are measured with the first model, those without a seed of their own with the first seed
    asked = first and method == plan.methods[0]
    wanted = [one for one in plan.baselines if asked and (seed == plan.seeds[0] or one == "sasrec")]
    beside = [*train, evaluate(f"{name}-{_digest(wanted)}", "--baselines", *wanted)] if wanted else []
    widths = [*train]
    if method == "nezha" and first and seed == plan.seeds[0]:
        for width, validity in itertools.product(plan.curve, ("stepwise", "final")):
            more = "--beam-width", str(width), "--validity", validity, "--baselines"
            widths.append(evaluate(f"{name}{CURVE}{width}-{validity}", *more))
    baselines = Job(f"{name}: baselines", beside, (name,))
    last = baselines.name if beside else name  # one after another: without a checkpoint each would train
    alone = []
    if method == "nezha" and first and seed == plan.seeds[0] and plan.alone:
        methods = [one for one in plan.methods if one not in ("nezha", "nezha-4") and not variant_of(one)]
        others = [_trained(plan, places, dataset, model, one, seed) for one in methods]
        against = ["--against", *(str(one[1]) for one in others)] if others else []
        ask = "--alone", str(plan.alone), "--baselines"
        alone = [*train, *(step for one in others for step in one[2]), evaluate(f"{name}{ALONE}", *against, *ask)]
        if "nezha-4" in plan.methods:
            alone.append(evaluate(f"{name}{ALONE}-final", "--validity", "final", *ask))
    return [
        Job(name, steps, (f"{dataset}: data", *taught_by)),
        baselines,
        Job(f"{name}: widths", widths if len(widths) > len(train) else [], (last,)),
        Job(f"{name}: alone", alone, (name,), alone=True),
    ]


def variant_of(method: str) -> str:
    """The ending of its name that says what it is trained with or without; empty for none."""
    return next((variant for variant in VARIANTS if method.endswith(variant)), "")


def _trained_as(method: str) -> str:
    return "nezha" if method == "nezha-4" else method


def _trained(
    plan: Plan, places: Places, dataset: str, model: str, method: str, seed: int
) -> tuple[str, Path, list[Step], list[str]]:
    """Name of a training run, its checkpoint, the steps that make it, and the runs whose checkpoints it reads."""
    folder, catalogue = _dataset(plan, places, dataset)
    options = [*plan.train, *plan.models[model].get("train", []), *plan.datasets[dataset].get("train", [])]
    options += plan.by_method.get(method, [])
    variant = variant_of(method)
    options += ["--method", method.removesuffix(variant), *VARIANTS.get(variant, []), "--seed", str(seed)]
    hashed, filled, before, teachers = list[str](), list[str](), list[Step](), list[str]()
    for word in options:
        if found := TEACHER.fullmatch(word):
            teacher, read, before, _ = _trained(plan, places, dataset, found[1], method, seed)
            teachers.append(teacher)
        hashed.append(teacher if found else word)
        filled.append(str(read) if found else word)
    name = f"{dataset}/{model}/{method}/{seed}/{_digest([plan.datasets[dataset], hashed, plan.evaluate])}"
    checkpoint = places.work / "models" / name / "checkpoint"
    words = ["train", str(folder), str(catalogue), *filled, "--out", str(checkpoint)]
    if "--teacher" in options:  # methods of one data set and seed have the same SASRec
        words += ["--teacher-cache", str(places.work / "teachers")]
    return name, checkpoint, [*before, Step(words, checkpoint / "config.json")], teachers


def _dataset(plan: Plan, places: Places, name: str) -> tuple[Path, Path]:
    """Folders of sequences and catalogue."""
    spec = plan.datasets[name]
    prepared, tokenized = _digest(spec["prepare"]), _digest([spec["prepare"], spec.get("tokenize", [])])
    folder = places.work / "datasets"
    return folder / f"{name}-{prepared}", folder / f"{name}-{tokenized}-catalogue"


def _digest(spec: Any) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]


def finished_runs(results: Path) -> set[str]:
    """Names of the runs that have lines in the results file."""
    if not results.is_file():
        return set()
    with results.open(newline="", encoding="utf-8") as file:
        rows: list[Mapping[str, str]] = list(csv.DictReader(file))
    return {row.get("run", "") for row in rows} - {""}


def remaining(job: Job, finished: set[str]) -> list[Step]:
    """The steps that are not done; none if all that is measured has its lines, even if the checkpoint is gone."""
    measured = [step for step in job.steps if step.run]
    if measured and all(is_done(step, finished) for step in measured):
        return []
    return [step for step in job.steps if not is_done(step, finished)]


def is_done(step: Step, finished: set[str]) -> bool:
    return step.made.is_file() if step.made else step.run in finished
