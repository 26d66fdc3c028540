"""Pictures of the quality rows: over beam width, over level sizes, over training time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import BLUE, GREY, ORANGE, RED, SKY, STYLE, legend, plt, save
from benchmarks.quality_curves import TRAINED, origin
from benchmarks.quality_rows import OURS, UNVERIFIED, Result

GREEN, PURPLE, BLACK = "#009E73", "#CC79A7", "#000000"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY, BLACK)
MARKERS = "osD^vP*X"
COLUMNS = 3


def draw(path: Path, figure: Any, title: str, said: str) -> Path:
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(said, x=0.01, ha="left", fontsize=8, color=GREY)
    return save(figure, path)


def draw_all(
    images: Path,
    widths: Sequence[Result],
    levels: Mapping[str, Mapping[str, Sequence[Result]]],
    times: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    said: str,
) -> list[Path]:
    """What there are rows for. ``said``: of the training times, where they come from."""
    paths = []
    with plt.rc_context(STYLE):
        if widths:
            title = f"{OURS}: beam width and validity"
            paths.append(draw(images / "quality-widths.svg", _widths(widths), title, origin(widths)))
        if rows := [one for by in levels.values() for found in by.values() for one in found]:
            title = f"{OURS} on {rows[0].dataset}: level sizes"
            paths.append(draw(images / "quality-levels.svg", _levels(levels), title, origin(rows)))
        if times:
            paths.append(draw(images / "quality-time.svg", _times(times), "Validation items over training time", said))
    return paths


def _widths(rows: Sequence[Result]) -> Any:
    """Hit@10 over beam width, and the share of valid beams where validity is checked at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.2))
    for number, dataset in enumerate(dict.fromkeys(one.dataset for one in rows)):
        look = {"color": COLOURS[number], "marker": MARKERS[number]}
        for mode, line in (
            ("stepwise", {"linestyle": "-"}),
            ("final", {"linestyle": "--", "markerfacecolor": "white"}),
        ):
            found = [one for one in rows if (one.dataset, one.row["validity"]) == (dataset, mode)]
            widths = [int(one.row["beam_width"]) for one in found]
            label = dataset if mode == "stepwise" else f"{dataset}, final validity"
            left.plot(widths, [one.number("hit@10") for one in found], label=label, **look, **line)
            if mode == "final":
                right.plot(widths, [one.number("valid") for one in found], **look, **line)
    ticks = sorted({int(one.row["beam_width"]) for one in rows})
    for axis in (left, right):
        axis.set(xscale="log", xlabel="beam width K")
        axis.set_xticks(ticks, [f"{width:,}" for width in ticks], rotation=45)
        axis.minorticks_off()
    left.set(title="Hit@10", ylim=(0, 1.1 * max(one.number("hit@10") or 0 for one in rows)))
    right.set(title="Share of valid beams, final validity", ylim=(0, 1.05))
    legend(figure, [left])
    return figure


def _levels(levels: Mapping[str, Mapping[str, Sequence[Result]]]) -> Any:
    """Each seed a point: what is found with either validity, and the share of valid beams at the end."""
    panels = (("hit@10", "Hit@10"), ("ndcg@10", "NDCG@10"), ("valid", "Share of valid beams"))
    figure, axes = plt.subplots(1, len(panels), figsize=(11.2, 3.8))
    for axis, (name, title) in zip(axes, panels, strict=True):
        for method, label, colour, marker in (
            (OURS, "stepwise validity", BLUE, "o"),
            (UNVERIFIED, "final validity", ORANGE, "^"),
        ):
            points = [(at, one.number(name)) for at, by in enumerate(levels.values()) for one in by[method]]
            places, values = np.array(points, dtype=float).reshape(-1, 2).T
            axis.plot(places, values, color=colour, marker=marker, linestyle="none", label=label)
        top = max(line.get_ydata().max(initial=0) for line in axis.get_lines())
        axis.set(title=title, ylim=(0, 1.1 * top), xlim=(-0.5, len(levels) - 0.5), xlabel="levels × codes")
        axis.set_xticks(range(len(levels)), list(levels))
    legend(figure, [axes[0]])
    return figure


def _times(lines: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Any:
    """A panel a data set, a line a method."""
    columns = min(COLUMNS, len(lines))
    rows = -(-len(lines) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 + 3.6 * columns, 0.8 + 3 * rows), squeeze=False)
    flat = [axis for row in axes for axis in row]
    for axis, (dataset, by) in zip(flat, lines.items(), strict=False):
        for method, (minutes, scores) in by.items():
            number = TRAINED.index(method)
            axis.plot(minutes, scores, color=COLOURS[number], marker=MARKERS[number], markersize=4, label=method)
        axis.set(title=dataset, xlabel="minutes of training", ylim=(0, None), xlim=(0, None))
    for row in axes:
        row[0].set_ylabel("NDCG@10, validation items")
    for axis in flat[len(lines) :]:
        axis.set_visible(False)
    legend(figure, flat[: len(lines)])
    return figure
