"""What a worker is made from, and the worker: a part in, a file out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nezha_vllm.batch.columns import Columns
from nezha_vllm.batch.output import Output
from nezha_vllm.batch.parts import Part

if TYPE_CHECKING:
    from vllm import LLM

CHUNK = 2_000  # rows in the engine at once: bounds the memory of their answers


@dataclass(frozen=True)
class Recipe:
    """Everything a worker needs, picklable. ``engine`` are arguments of ``vllm.LLM``."""

    checkpoint: str
    out: str
    columns: Columns
    options: dict[str, Any]
    last: int | None
    catalogue: str
    catalogue_version: str
    engine: dict[str, Any] = field(default_factory=dict)

    def start(self) -> LLM:
        """The engine, with the job's catalogue version and no other."""
        from vllm import LLM

        additional = dict(self.engine.get("additional_config") or {})
        pinned = {"catalogue": self.catalogue, "catalogue_version": self.catalogue_version}
        nezha = {**additional.get("nezha", {}), **pinned}
        settings = {"disable_log_stats": True, **self.engine}
        return LLM(self.checkpoint, **{**settings, "additional_config": {**additional, "nezha": nezha}})


class Worker:
    """Scores parts with an engine that it starts."""

    def __init__(self, recipe: Recipe) -> None:
        from nezha_vllm.batch.scorer import Scorer

        self.output, self.columns = Output(recipe.out), recipe.columns
        self.scorer = Scorer(recipe.start(), recipe.columns, recipe.options, recipe.last)

    def run(self, part: Part, advance: Callable[[int], None] = lambda rows: None) -> int:
        """Score a part and write it; returns how many rows are errors. ``advance`` hears how many are scored."""
        table, done = part.read(self.columns.read), []
        for first in range(0, part.rows, CHUNK):
            done.append(self.scorer(table.slice(first, CHUNK)))
            advance(first + len(done[-1]))
        return self.output.write(part, pa.concat_tables(done))


def describe(path: Path) -> list[int]:
    """Size and time of a file: another checkpoint in the same folder is another job."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
