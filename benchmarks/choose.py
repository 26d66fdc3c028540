"""Which rows a table or plot shows: those of one machine and vLLM, of each measurement the newest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import Row, read

KEY = (
    *("benchmark", "system", "model", "part", "dtype", "prompt_tokens", "levels", "codes", "hidden", "items"),
    *("beam_width", "n", "transport", "load", "concurrency", "request_rate", "prefix_caching"),
)

DEFAULT = "async scheduling"


def results(folder: Path, name: str, gpu: str = "", vllm: str = "") -> list[Row]:
    """Rows of ``NAME.csv`` that may stand in one table; empty without such a file."""
    return newest(one_machine(measured(folder, name), gpu, vllm))


def of_each_gpu(folder: Path, name: str, gpu: str = "", vllm: str = "") -> list[Row]:
    """The same of every GPU whose name begins with ``gpu``; rows of two GPUs are no rows of one table."""
    rows = [row for row in measured(folder, name) if row.gpu.startswith(gpu)]
    each = [[row for row in rows if row.gpu == found] for found in dict.fromkeys(row.gpu for row in rows)]
    return [row for found in each for row in newest(one_machine(found, vllm=vllm))]


def measured(folder: Path, name: str) -> list[Row]:
    """All rows of ``NAME.csv``; empty without such a file."""
    file = folder / f"{name}.csv"
    return read(file) if file.is_file() else []


def together(folder: Path, name: str, gpu: str = "", vllm: str = "") -> list[Row]:
    """HTTP rows of ``NAME.csv`` of the last commit and GPU that both NEZHA and stock beam search were measured at.

    Models have their bare names: a label may add the GPU and vLLM's default, async scheduling, and rows whose label
    adds more are of something else.
    """
    rows = [_bare(row) for row in measured(folder, name) if row.gpu.startswith(gpu) and row.vllm.startswith(vllm)]
    rows = sorted((row for row in rows if row.transport == "http" and ", " not in row.model), key=lambda row: row.date)
    places = [{(row.gpu, row.commit) for row in rows if row.system == system} for system in ("nezha", "vllm-beam")]
    both = [row for row in rows if (row.gpu, row.commit) in places[0] & places[1]]
    return newest(row for row in both if (row.gpu, row.commit) == (both[-1].gpu, both[-1].commit))


def _bare(row: Row) -> Row:
    model, *more = row.model.split(", ")
    return replace(row, model=", ".join([model, *(text for text in more if text not in (*row.gpu.split(), DEFAULT))]))


def one_machine(rows: Sequence[Row], gpu: str = "", vllm: str = "") -> list[Row]:
    """Rows of one GPU name and vLLM version: those asked for, else of the highest version and there of most rows.

    Rows without a GPU come last. ``gpu`` and ``vllm`` need only be the beginning of the names.
    """
    rows = [row for row in rows if row.gpu.startswith(gpu) and row.vllm.startswith(vllm)]
    if not rows:
        return []
    count = Counter((row.gpu, row.vllm) for row in rows)

    def rank(row: Row) -> tuple[object, ...]:
        return not row.gpu.startswith("none"), _release(row.vllm), count[row.gpu, row.vllm], row.date

    last = max(rows, key=rank)
    return [row for row in rows if (row.gpu, row.vllm) == (last.gpu, last.vllm)]


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, oldest first. Rates of an open loop come from one commit, the last one's.

    Settings belong to the key where rows of one run differ in them: of ``validity``, and of kernels with item scores.
    """
    found: dict[tuple[object, ...], Row] = {}
    commits: dict[tuple[object, ...], str] = {}
    for row in sorted(rows, key=lambda row: row.date):
        key = tuple(getattr(row, name) for name in KEY)
        if row.benchmark in ("validity", "kernels"):
            key += (row.settings,)
        found.pop(key, None)
        found[key] = row
        if row.load == "open":
            commits[_cell(row)] = row.commit
    return [row for row in found.values() if row.load != "open" or row.commit == commits[_cell(row)]]


def _cell(row: Row) -> tuple[object, ...]:
    return row.system, row.model, row.prompt_tokens, row.beam_width, row.n
