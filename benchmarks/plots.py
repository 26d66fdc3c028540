"""Plots of the measured rows: latency over beam width, throughput and its p99 over load, the draft stage and its floor.

Colours are Okabe and Ito's, which the colour-blind tell apart; markers and line styles differ as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

from benchmarks.choose import of_each_gpu, results, together
from benchmarks.markdown import NAMES, by, systems_of
from benchmarks.rows import Row
from benchmarks.served_tables import BOUND_MS

BLUE, ORANGE, SKY, RED, GREY = "#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#666666"
LOOKS = {
    "nezha": (BLUE, "o"),
    "vllm-beam": (RED, "s"),
    "vllm-one-token": (GREY, "D"),
    "hf-beam": (ORANGE, "^"),
    "hf-nezha": (SKY, "v"),
    "triton": (BLUE, "o"),
    "pytorch": (RED, "s"),
    "pytorch, compiled": (ORANGE, "^"),
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "nezha",  # the same rows give the same file
}


def draw_all(folder: Path, images: Path, gpu: str = "", vllm: str = "") -> Iterator[Path]:
    """Draw what there are rows for, of one run beside stock vLLM where there is one; yields the files."""
    from benchmarks.timeline import draw_timeline, timelines

    plots = [
        ("latency", "latency", draw_latency),
        ("throughput", "throughput", draw_throughput),
        ("draft-stage", "kernels", draw_stage),
    ]
    with plt.rc_context(STYLE):
        for name, benchmark, draw in plots:
            one_run = [] if name == "draft-stage" else together(folder, benchmark, gpu, vllm)
            figure = draw(one_run or results(folder, benchmark, gpu, vllm))
            if figure is not None:
                yield save(figure, images / f"{name}.svg")
        for file in timelines(folder):
            yield save(draw_timeline(file, of_each_gpu(folder, "profile", vllm=vllm)), images / f"{file.stem}.svg")


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


def draw_latency(rows: Sequence[Row]) -> Any:
    """p50 over beam width as lines, up to p99 as bars; a panel a prompt size, of the model with most rows.

    Rows called watched have no bars: their p99 is that of ``nvidia-smi``.
    """
    rows = most_measured([row for row in rows if row.transport == "http" and row.p50_ms is not None])
    rows = [row for row in rows if row.load != "batch"]
    prompts, watched = by(rows, "prompt_tokens"), any("watched" in row.model for row in rows)
    prompts = [panel for panel in prompts if len({row.beam_width for row in panel[1]}) > 1] or prompts  # no lone points
    if not prompts:
        return None
    figure, axes = plt.subplots(1, len(prompts), figsize=(2.4 + 4.2 * len(prompts), 4.2), sharey=True, squeeze=False)
    for axis, (prompt, found) in zip(axes[0], prompts, strict=True):
        for system in systems_of(found):
            points = by([row for row in found if row.system == system], "beam_width")
            colour, marker = LOOKS[system]
            if system == "vllm-one-token":
                axis.axhline(points[0][1][-1].p50_ms, color=colour, linestyle=":", label="vLLM, one token, no beams")
                continue
            chosen = [max(cell, key=lambda row: row.n or 0) for _, cell in points]
            widths, middles = [row.beam_width or 0 for row in chosen], [row.p50_ms or 0 for row in chosen]
            above = [max(0.0, (row.p99_ms or 0) - (row.p50_ms or 0)) for row in chosen]
            bars = None if watched else [[0] * len(above), above]
            axis.errorbar(widths, middles, yerr=bars, color=colour, marker=marker, capsize=3, label=NAMES[system])
        logarithmic(axis, x=sorted({row.beam_width or 0 for row in found if row.system != "vllm-one-token"}))
        axis.set(title=f"{prompt:,} prompt tokens", xlabel="beam width K")
    axes[0][0].set_ylabel("milliseconds, p50" if watched else "milliseconds, p50 and up to p99")
    legend(figure, axes[0])
    return captioned(figure, rows, f"{rows[0].model}: latency over HTTP, one request at a time")


def draw_throughput(rows: Sequence[Row]) -> Any:
    """Requests/s over clients, and p99 over requests/s of both loops; lines of one system differ in beam width."""
    rows = [row for row in rows if row.transport == "http" and row.requests_per_s and row.p99_ms]
    rows = most_measured([row for row in rows if ", " not in row.model] or rows)  # without circumstances in its label
    if not rows:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.4))
    for (system, width), found in by(rows, "system", "beam_width"):
        colour, marker = LOOKS[system]
        style = line_style(width, [row.beam_width or 0 for row in rows if row.system == system])
        label = NAMES[system] + ("" if system == "vllm-one-token" else f", K = {width}")
        closed = sorted((row for row in found if row.load == "closed"), key=lambda row: row.concurrency or 0)
        opened = sorted((row for row in found if row.load == "open"), key=lambda row: row.requests_per_s or 0)
        speeds = [row.requests_per_s or 0 for row in closed]
        clients = [row.concurrency or 0 for row in closed]
        left.plot(clients, speeds, color=colour, marker=marker, linestyle=style, label=label)
        right.plot(speeds, [row.p99_ms for row in closed], color=colour, marker=marker, linestyle=style)
        right.plot([row.requests_per_s for row in opened], [row.p99_ms for row in opened], color=colour,
                   marker=marker, markerfacecolor="white", linestyle="none")  # fmt: skip
    logarithmic(left, x=sorted({row.concurrency or 0 for row in rows if row.load == "closed"}))
    logarithmic(right)
    left.set(title="Closed loop", xlabel="clients, each with one request in flight", ylabel="requests/s")
    right.set(title="What it costs: filled closed loop, hollow Poisson arrivals", xlabel="requests/s", ylabel="p99, ms")
    right.axhline(BOUND_MS, color=GREY, linestyle=":", linewidth=1.5)
    right.annotate(f"{BOUND_MS:g} ms", (0.01, BOUND_MS), xycoords=("axes fraction", "data"), color=GREY, va="bottom")
    legend(figure, [left])
    return captioned(figure, rows, f"{rows[0].model}: throughput over HTTP")


def draw_stage(rows: Sequence[Row]) -> Any:
    """µs of the draft stage over beam width, one request at a time, and over requests at the width of most rows."""
    rows = [row for row in rows if row.part == "draft stage" and row.us is not None and not row.settings]
    shapes = by(rows, "levels", "codes", "hidden", "dtype", "items")
    if not shapes:
        return None
    rows = max(shapes, key=lambda shape: len(shape[1]))[1]
    width, _ = max(by(rows, "beam_width"), key=lambda found: (len(found[1]), found[0] == 512))
    panels = [
        ("beam_width", [row for row in rows if row.concurrency == 1], "beam width K", "One request"),
        ("concurrency", [row for row in rows if row.beam_width == width], "requests at once", f"K = {width}"),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (column, found, label, title) in zip(axes, panels, strict=True):
        for system in systems_of(found):
            chosen = sorted((row for row in found if row.system == system), key=lambda row: getattr(row, column))
            at, (colour, marker) = [getattr(row, column) for row in chosen], LOOKS[system]
            if system != "triton":
                axis.plot(at, [row.us for row in chosen], color=colour, marker=marker, label=NAMES[system])
                continue
            axis.plot(at, [row.cold_us for row in chosen], color=colour, marker=marker, label="Triton, cold L2")
            axis.plot(at, [row.us for row in chosen], color=SKY, marker=".", label="Triton, warm L2")
            axis.plot(at, [row.floor_us for row in chosen], color=GREY, linestyle="--", label="floor")
        logarithmic(axis, x=sorted({getattr(row, column) for row in found}))
        axis.set(title=title, xlabel=label)
    axes[0].set_ylabel("µs")
    legend(figure, axes)
    first = rows[0]
    shape = f"L = {first.levels}, T = {first.codes}, H = {first.hidden}, {first.dtype}, {first.items:,} items"
    return captioned(figure, rows, f"Draft stage: {shape}")


def most_measured(rows: Sequence[Row]) -> list[Row]:
    """Rows of the model with most of them."""
    models = by(rows, "model")
    return max(models, key=lambda found: len(found[1]))[1] if models else []


def line_style(width: int, widths: Sequence[int]) -> str:
    return ("-", "--", ":", "-.")[sorted(set(widths)).index(width) % 4]


def legend(figure: Any, axes: Iterable[Any]) -> None:
    """One for all panels, on the right: lines that nearly coincide leave no room for names beside them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)


def logarithmic(axis: Any, x: Sequence[float] = ()) -> None:
    """Both axes logarithmic with plain numbers; ticks of the x axis where something was measured."""
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))  # labels within less than a decade
    axis.xaxis.set_major_formatter(plain)
    if x:
        axis.set_xticks(x)
        axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.08, y=0.12)


def captioned(figure: Any, rows: Sequence[Row], title: str) -> Any:
    """A title above, and below where the numbers come from."""
    first, commits = rows[0], ", ".join(dict.fromkeys(row.commit for row in rows))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(f"{first.gpu}, vLLM {first.vllm}, commit {commits}", x=0.01, ha="left", fontsize=8, color=GREY)
    return figure
