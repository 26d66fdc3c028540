"""The picture of one request: what host and GPU do when, and each part of the GPU's time beside its floor."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import number
from benchmarks.rows import Row

if TYPE_CHECKING:
    from benchmarks.workload import Cell

# neighbours differ in lightness, too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#000000")
HATCHES = (None, "///", "...")
PARTS = {"linear layers": "#0072B2", "norms, activations, rotary": "#56B4E9", "attention": "#E69F00"}
PARTS |= {"cache write": "#F0E442", "copies": "#999999", "input kernel": "#000000", "gather of states": "#CC79A7"}
DRAFT, GREY = "#D55E00", "#666666"
SUMS = ("gpu: all kernels", "gpu: first start to last end", "gpu: draft stage")


def name_of(model: str, cell: Cell) -> str:
    """Of a timeline's file and picture, without their endings."""
    return f"timeline-{re.sub(r'[^a-z0-9.]+', '-', model.lower())}-{cell.prompt_tokens}-{cell.beam_width}"


def timelines(folder: Path) -> list[Path]:
    return sorted(folder.glob("timeline-*.json"))


def links(folder: Path) -> str:
    """The pictures, as Markdown of a page beside ``images``; empty without any."""
    return "\n\n".join(
        f"![{text}: what host and GPU do, and each part beside its floor](images/{file.stem}.svg)"
        for file in timelines(folder)
        for text in [title(json.loads(file.read_text(encoding="utf-8")))]
    )


def title(found: dict[str, Any]) -> str:
    return f"{found['model']}: one request of {found['prompt_tokens']} tokens, K = {found['beam_width']}"


def draw_timeline(file: Path, rows: Sequence[Row]) -> Any:
    import matplotlib.pyplot as plt

    found = json.loads(file.read_text(encoding="utf-8"))
    figure, (lanes, bars) = plt.subplots(2, 1, figsize=(11, 7.6), height_ratios=(1, 1.25))
    figure.set_layout_engine("constrained")
    draw_lanes(lanes, found)
    draw_bars(bars, [row for row in rows if is_part(row, found)])
    figure.suptitle(
        f"{title(found)}, {found['n']} items, in process", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    caption = f"{found['gpu']}, vLLM {found['vllm']}, commit {found['commit']}"
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


def draw_lanes(axis: Any, found: dict[str, Any]) -> None:
    """Host steps above, kernels below, on one clock; steps inside others are drawn over them."""
    steps = list(dict.fromkeys(step for step, *_ in found["steps"]))
    handles = {}
    for step, start, end, _ in sorted(found["steps"], key=lambda span: span[3]):
        place = steps.index(step)
        look: dict[str, Any] = {"facecolor": COLOURS[place % len(COLOURS)], "edgecolor": "white", "linewidth": 0.3}
        handles[step] = axis.broken_barh(
            [(start, end - start)], (1.1, 0.8), **look, hatch=HATCHES[place // len(COLOURS)]
        )
    for part, start, end in found["kernels"]:
        axis.broken_barh([(start, end - start)], (0.1, 0.8), color=colour_of(part), linewidth=0)
    axis.set(yticks=[0.5, 1.5], yticklabels=["GPU", "host"], ylim=(0, 2), xlabel="µs")
    axis.grid(False, axis="y")
    axis.margins(x=0.005)
    axis.legend([handles[step] for step in steps], steps, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False,
                fontsize=8, title="host", alignment="left")  # fmt: skip


def draw_bars(axis: Any, rows: Sequence[Row]) -> None:
    """A bar a part, longest above, and its floor as a black line across it."""
    rows = sorted(rows, key=lambda row: row.us or 0)
    names = [row.part.removeprefix("gpu: ") for row in rows]
    places = range(len(rows))
    axis.barh(places, [row.us or 0 for row in rows], color=[colour_of(name) for name in names], height=0.7)
    axis.set_yticks(places, names)
    for height, row in enumerate(rows):
        text = f"{number(row.us)} µs" + (f", {row.launches:g} ×" if row.launches else "")
        if row.floor_us is not None:
            axis.plot([row.floor_us] * 2, [height - 0.45, height + 0.45], color="black", linewidth=2)
            text += f", floor {number(row.floor_us)}"
        axis.annotate(text, (max(row.us or 0, row.floor_us or 0), height), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.set(title="GPU time of a request by part, launches, and the floor of each (black line)", xlabel="µs")
    axis.grid(False, axis="y")
    axis.margins(x=0.25, y=0.02)


def is_part(row: Row, found: dict[str, Any]) -> bool:
    same = (row.gpu, row.model, row.engine_tokens, row.beam_width, row.n) == tuple(
        found[name] for name in ("gpu", "model", "prompt_tokens", "beam_width", "n")
    )
    return same and row.part.startswith("gpu: ") and row.part not in SUMS and row.us is not None


def colour_of(part: str) -> str:
    return DRAFT if part.startswith("draft: ") else PARTS.get(part, "#999999")
