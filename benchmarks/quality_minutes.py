"""GPU minutes of runs that shared a GPU: every moment is divided among those that were at work.

A row says when its evaluation ended, how long that and the training before it took, and which GPU it was on. Imports
and what is done between the steps are not counted. Jobs that were cut off have no row, so what they had of a GPU falls
to those beside them: of several seeds the least is nearest to the truth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from benchmarks.quality_rows import Result

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class Span:
    """A training or evaluation, in seconds since 1970."""

    key: tuple[str, str]
    gpu: str
    begin: float
    end: float


def gpu_minutes(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """(run, ``training`` or ``evaluation``) → minutes of a whole GPU; nothing for runs on a CPU.

    ``results`` are all rows, those of other tables as well: they shared the GPU. A training counts to the first run
    that measured its checkpoint.
    """
    minutes: dict[tuple[str, str], float] = defaultdict(float)
    by_gpu: dict[str, list[Span]] = defaultdict(list)
    for span in _spans(results):
        by_gpu[span.gpu].append(span)
    for spans in by_gpu.values():
        edges = sorted({span.begin for span in spans} | {span.end for span in spans})
        for begin, end in pairwise(edges):
            busy = [span for span in spans if span.begin <= begin and span.end >= end]
            for span in busy:
                minutes[span.key] += (end - begin) / len(busy) / 60
    return dict(minutes)


def total(minutes: dict[tuple[str, str], float], runs: Collection[str], part: str = "") -> float:
    """Of some runs, trainings and evaluations or one of them."""
    return sum(value for (run, kind), value in minutes.items() if run in runs and part in ("", kind))


def _spans(results: Sequence[Result]) -> list[Span]:
    spans: list[Span] = []
    trained: set[tuple] = set()
    evaluations: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        if one.config.get("device") != "cpu":
            evaluations[one.run].append(one)
    for run, rows in evaluations.items():
        end = max(datetime.fromisoformat(one.row["date"]).timestamp() for one in rows)
        begin = end - sum(float(one.row["seconds"]) for one in rows)
        gpu = next((one.config["gpu"] for one in rows if one.config.get("gpu")), "")
        spans.append(Span((run, EVALUATION), gpu, begin, end))
        for one in rows:
            seconds = one.config.get("train_seconds")
            kind = [
                one.config.get(name) for name in ("method", "item_tokens", "item_loss", "softmax", "short_histories")
            ]
            mark = one.dataset, one.model, *kind, *(one.config.get("teachers") or ()), one.seed, seconds
            if seconds and mark not in trained:
                trained.add(mark)
                if until := one.config.get("trained_until"):  # older rows: it was evaluated at once
                    begin = datetime.fromisoformat(until).timestamp()
                spans.append(Span((run, TRAINING), gpu, begin - seconds, begin))
                begin -= seconds  # of several, one was trained after the other
    return spans
