"""What the plans measure beside the main tables: quality over beam width, and the search on validation items.

Written and drawn by ``benchmarks.quality_tables``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.markdown import table
from benchmarks.quality_plan import CURVE, PARTS_OF_A_RUN

MODES = ("stepwise", "final")
SEARCHED = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")


def curve_rows(path: Path) -> list[dict[str, str]]:
    """Test rows of the beam widths, narrow first; of each the newest."""
    with path.open(newline="", encoding="utf-8") as file:
        found = {row["run"]: row for row in csv.DictReader(file) if CURVE in row["run"] and row["split"] == "test"}
    return sorted(found.values(), key=lambda row: (row["dataset"], int(row["beam_width"])))


def curve_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line a data set and width: what is found, and the share of valid beams, with either validity."""
    lines = []
    for dataset, width in dict.fromkeys((row["dataset"], row["beam_width"]) for row in rows):
        cells = {row["validity"]: row for row in rows if (row["dataset"], row["beam_width"]) == (dataset, width)}
        figures = [
            f"{float(cells[mode][name]):.4f}" if mode in cells and cells[mode][name] else "–"
            for name in ("hit@10", "ndcg@10", "valid")
            for mode in MODES
        ]
        lines.append([dataset, width, *figures])
    heads = [f"{name}, {mode}" for name in ("Hit@10", "NDCG@10", "valid beams") for mode in MODES]
    return table(["data set", "beam width", *heads], lines, left=1)


def search_table(results: Sequence[Any]) -> str:
    """One line a data set (with its tokenizer), change of options and method, best NDCG@10 first; means over seeds."""
    groups: dict[tuple, list] = {}
    for one in results:
        if one.model:  # no baselines
            groups.setdefault((one.dataset, one.model, one.method), []).append(one)
    lines = [
        [*key, str(len(group)), *(f"{fmean(one.number(name) for one in group):.4f}" for name in SEARCHED)]
        for key, group in groups.items()
    ]
    lines.sort(key=lambda line: (-float(line[-1]), line))
    return table(["data set", "options", "", "seeds", "Hit@5", "Hit@10", "NDCG@5", "NDCG@10"], lines, left=3)


def draw_curve(rows: Sequence[Mapping[str, str]]) -> Any:
    """Hit@10 and the share of valid beams over beam width, lines of either validity; a column a data set."""
    from benchmarks.plots import BLUE, GREY, ORANGE, legend, plt

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    size = 2.4 + 4.2 * len(datasets), 5.4
    figure, axes = plt.subplots(2, len(datasets), figsize=size, sharex=True, sharey="row", squeeze=False)
    looks = {"stepwise": (BLUE, "o", "-"), "final": (ORANGE, "^", "--")}
    for column, dataset in enumerate(datasets):
        for mode in MODES:
            found = [row for row in rows if (row["dataset"], row["validity"]) == (dataset, mode)]
            widths = [int(row["beam_width"]) for row in found]
            colour, marker, line = looks[mode]
            for axis, name in zip(axes[:, column], ("hit@10", "valid"), strict=True):
                label = f"{mode} validity"
                values = np.array([float(row[name]) for row in found])
                axis.plot(widths, values, color=colour, marker=marker, linestyle=line, label=label)
        axes[0][column].set_title(dataset)
        ticks = sorted({int(row["beam_width"]) for row in rows})
        axes[1][column].set(xscale="log", xlabel="beam width K")
        axes[1][column].set_xticks(ticks, [f"{width:,}" for width in ticks])
        axes[1][column].minorticks_off()
    for row, name in zip(axes, ("Hit@10", "share of valid beams"), strict=True):
        top = max(line.get_ydata().max() for axis in row for line in axis.get_lines())
        row[0].set(ylabel=name, ylim=(0, 1.08 * top))
    legend(figure, [axes[0][0]])
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    figure.set_layout_engine("constrained")
    model = first["run"].split("/")[1] if len(first["run"].split("/")) == PARTS_OF_A_RUN else ""
    figure.suptitle(f"{first['method']}, {model}: beam width", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(f"seed {first['seed']}, commit {commits}", x=0.01, ha="left", fontsize=8, color=GREY)
    return figure
