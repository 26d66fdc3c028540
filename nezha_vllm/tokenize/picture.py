"""The report of semantic IDs as a picture: use of codes, items on an ID, and how far neighbours share prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nezha_vllm.tokenize.report import Report

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#666666")


def draw(path: Path, codes: np.ndarray, report: Report, neighbours: Sequence[float]) -> None:
    """Write an SVG, PNG or PDF, by the name. ``neighbours`` may be empty. Raises ``ValueError`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib; pip install matplotlib, or leave --picture out") from None
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    use, groups, shared = figure.subplots(1, 3)
    for level, (size, column) in enumerate(zip(report.codebook_sizes, codes.T, strict=True)):
        counts = np.sort(np.bincount(column, minlength=size))[::-1]
        use.plot(np.arange(1, size + 1), counts, color=COLOURS[level % len(COLOURS)], label=f"level {level + 1}")
    use.set(title="Items a code", xlabel="code, most used first", ylabel="items", ylim=(0, None))
    use.legend(frameon=False)
    sizes = list(report.group_sizes)
    groups.bar([str(size) for size in sizes], [report.group_sizes[size] for size in sizes], color=COLOURS[0])
    groups.set(title=f"{report.unique_share:.2%} of the items alone on their ID", xlabel="items on an ID", ylabel="IDs")
    groups.set_yscale("log")
    if neighbours:
        levels = [str(level) for level in range(1, len(neighbours) + 1)]
        shared.bar(levels, [100 * share for share in neighbours], color=COLOURS[2])
        shared.set(title="Nearest item has the same prefix", xlabel="codes", ylabel="% of items", ylim=(0, 100))
    else:
        shared.set_axis_off()
    for axes in (use, groups, shared):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ValueError(f"--picture {path}: {error}") from None
