"""What the tables share: cells, groups of rows, names as readers know them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.rows import Row

NAMES = {
    "nezha": "NEZHA",
    "vllm-beam": "vLLM beam search",
    "vllm-one-token": "vLLM, one token",
    "hf-beam": "transformers beam search",
    "hf-nezha": "NEZHA in transformers",
    "triton": "Triton",
    "pytorch": "PyTorch",
    "pytorch, compiled": "PyTorch, compiled",
}
SHAPE = ("levels", "codes", "hidden", "dtype")


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], left: int = 0) -> str:
    """A Markdown table, numbers to the right but for the first ``left`` columns."""
    rule = ["---" if column < left else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *lines])


def number(value: float | None, digits: int = 1) -> str:
    """With ``digits`` decimals below 1,000; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 or digits == 0 else f"{value:,.{digits}f}"


def whole(*values: float | None) -> list[str]:
    return [number(value, 0) for value in values]


def by(rows: Sequence[Row], *names: str) -> list[tuple[Any, list[Row]]]:
    """Groups of equal attributes, in their order; rows keep theirs. The key is a tuple, or the only attribute."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(0 if getattr(row, name) is None else getattr(row, name) for name in names)
        groups.setdefault(key if len(key) > 1 else key[0], []).append(row)
    return sorted(groups.items())


def systems_of(rows: Sequence[Row]) -> list[str]:
    """The systems that rows are of, in the order of ``NAMES``."""
    return [name for name in NAMES if any(row.system == name for row in rows)]


def shape_text(row: Row) -> str:
    return f"L = {row.levels}, T = {row.codes}, H = {row.hidden}, {row.dtype}"


def origin(rows: Sequence[Row]) -> str:
    """One line: GPU, driver, versions, commits, days, and the ceilings if there are any."""
    first, last = rows[0], rows[-1]
    parts = [first.gpu + (f", driver {first.driver}" if first.driver else "")]
    versions = [("vLLM", "vllm"), ("PyTorch", "torch"), ("Triton", "triton")]
    parts.append(", ".join(f"{name} {_all(rows, column)}" for name, column in versions if _all(rows, column)))
    commits = list(dict.fromkeys(row.commit for row in rows if row.commit))
    parts.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
    days = sorted({row.date[:10] for row in rows})
    parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
    if last.ceiling_gb_per_s:
        ceilings = f"{number(last.ceiling_gb_per_s, 0)} GB/s and {number(last.ceiling_tflop_per_s, 0)} TFLOP/s"
        parts.append(f"measured ceilings {ceilings}")
    return "; ".join(parts) + "."


def _all(rows: Sequence[Row], column: str) -> str:
    return " and ".join(sorted({getattr(row, column) for row in rows} - {""}))
