"""Markdown of ``kernels.csv``, ``validity.csv`` and ``profile.csv``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.choose import newest
from benchmarks.markdown import NAMES, SHAPE, by, number, origin, shape_text, table, whole
from benchmarks.rows import ITEM_TOKENS, Row
from benchmarks.validity import costs

CELL = ("items", "beam_width", "concurrency")
STAGE = "draft stage"
HOUR = len("2026-01-01T00")  # of a date


def stages(rows: Sequence[Row]) -> str:
    """The draft stage as a whole over beam width and requests at once."""
    rows = [row for row in rows if row.part == STAGE and row.us is not None and not row.settings]
    return "\n\n".join(_stages_of(found) for _, found in by(rows, *SHAPE))


def _stages_of(rows: list[Row]) -> str:
    references = [name for name in ("pytorch", "pytorch, compiled") if any(row.system == name for row in rows)]
    lines = []
    for key, cell in by(rows, *CELL):
        times = {row.system: row for row in cell}
        ours = times.get("triton")
        if ours is None:
            continue
        line = [*whole(*key), number(ours.us), number(ours.cold_us), number(ours.floor_us)]
        line.append(f"{number(ours.times_floor)} ×")
        for name in references:
            us = times[name].us if name in times else None
            line += [number(us), f"{us / ours.us:.0f} ×"] if us and ours.us else ["", ""]
        lines.append(line)
    heads = ["items", "beam width", "requests", "µs, warm L2", "µs, cold L2", "floor µs", "cold to floor"]
    heads += [head for name in references for head in (f"{NAMES[name]} µs", "to warm")]
    return f"{shape_text(rows[0])}\n\n{table(heads, lines)}\n\n{origin(rows)}"


def item_scores(rows: Sequence[Row]) -> str:
    """What item scores add to the stage, from all rows of a machine.

    A difference is of one hour, GPU and commit. Cells without one stand here as long as none was measured both ways.
    """
    rows = [row for row in rows if row.part == STAGE and row.system == "triton" and row.us is not None]
    without = {_measured_together(row): row for row in rows if not row.settings}
    scored = [row for row in rows if row.settings.endswith(ITEM_TOKENS)]
    scored = newest([row for row in scored if _measured_together(row) in without] or scored)
    return "\n\n".join(_item_scores_of(found, without) for _, found in by(scored, *SHAPE))


def _measured_together(row: Row) -> tuple[object, ...]:
    return row.date[:HOUR], *(getattr(row, name) for name in ("gpu", "commit", *SHAPE, *CELL))


def _item_scores_of(rows: list[Row], without: dict[tuple[object, ...], Row]) -> str:
    lines = []
    for _, cell in by(rows, *CELL):
        for row in cell:
            plain = without.get(_measured_together(row), Row())
            known = int(row.settings.removesuffix(ITEM_TOKENS))
            line = whole(row.items, known, row.beam_width, row.concurrency)
            for before, us in ((plain.us, row.us), (plain.cold_us, row.cold_us)):
                added = us - before if us is not None and before is not None else None
                line += [number(before), number(us), number(added)]
            lines.append([*line, number(row.floor_us)])
    heads = ["items", "with a token", "beam width", "requests"]
    heads += [head for l2 in ("warm", "cold") for head in (f"µs, {l2} L2", "with item scores", "added")]
    return f"{shape_text(rows[0])}\n\n{table([*heads, 'floor with them'], lines)}\n\n{origin(rows)}"


def parts(rows: Sequence[Row]) -> str:
    """Kernel by kernel, for each number of requests, at the widest beam up to 512 of the catalogue measured last."""
    rows = [row for row in rows if row.part != STAGE and row.us is not None and not row.settings]
    rows = [row for row in rows if (row.beam_width or 0) <= 512]
    texts = []
    for _, found in by(rows, *SHAPE):
        width = max(row.beam_width or 0 for row in found)
        found = [row for row in found if row.beam_width == width]
        texts.append(_parts_of([row for row in found if row.items == found[-1].items]))
    return "\n\n".join(texts)


def _parts_of(rows: list[Row]) -> str:
    sizes = sorted({row.concurrency or 0 for row in rows})
    cells = {(row.part, row.concurrency): row for row in rows}
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        kernel, _, level = part.rpartition(" ")
        line = [f"`{kernel}`", level]
        for size in sizes:
            row = cells.get((part, size), Row())
            line += [number(row.cold_us), number(row.floor_us, 2), *whole(row.gb_per_s)]
            line += whole(row.tflop_per_s) if row.tflop_per_s else [""]
        lines.append(line)
    heads = ["kernel", "level"]
    heads += [head for size in sizes for head in (f"N = {size}: µs", "floor µs", "GB/s", "TFLOP/s")]
    title = f"{shape_text(rows[0])}, K = {rows[0].beam_width}, {number(rows[0].items, 0)} items, N requests, cold L2"
    return f"{title}\n\n{table(heads, lines, left=1)}\n\n{origin(rows)}"


def validity(rows: Sequence[Row]) -> str:
    """What keeping every beam inside the catalogue adds to the stage, and to a level."""
    found = [row for row in costs(rows) if row.part == STAGE]
    if not found:
        return ""
    cells = {row.settings: dict(by([r for r in rows if r.part == STAGE], "settings", *CELL)) for row in found}
    lines = []
    for row in sorted(found, key=lambda row: (row.items or 0, row.beam_width or 0, row.concurrency or 0)):
        [masked] = cells[row.settings][f"stepwise, {row.settings}", row.items, row.beam_width, row.concurrency]
        line = [*whole(row.items, row.beam_width, row.concurrency), row.settings, number(masked.cold_us)]
        lines.append([*line, number(row.cold_us), number((row.cold_us or 0) / (row.levels or 1), 2)])
    heads = ["items", "beam width", "requests", "keys found by", "stage µs", "of which validity", "a level"]
    return f"{shape_text(found[0])}, cold L2\n\n{table(heads, lines)}\n\n{origin(found)}"


def profile(rows: Sequence[Row], side: str) -> str:
    """Parts of one request on one ``side``, "gpu" or "host", in a table a GPU."""
    rows = [row for row in rows if row.part.startswith(f"{side}: ") and row.us is not None]
    on_gpu = side == "gpu"
    texts = []
    for (model, tokens, width, n, _), found in by(rows, "model", "engine_tokens", "beam_width", "n", "gpu"):
        lines = []
        for row in found:
            line = [row.part.partition(": ")[2], number(row.us)]
            line += ["" if row.floor_us is None else number(row.floor_us)] if on_gpu else []
            lines.append([*line, "" if row.launches is None else number(row.launches, 0)])
        heads = ["part", "µs", "floor µs", "launches"] if on_gpu else ["part", "µs", "calls"]
        title = f"**{model}**, {tokens} tokens, K = {width}, {n} items"
        texts.append(f"{title}\n\n{table(heads, lines, left=1)}\n\n{origin(found)}")
    return "\n\n".join(texts)
