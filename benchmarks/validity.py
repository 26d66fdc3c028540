"""What it costs a level to keep beams inside the catalogue: `python -m benchmarks.kernels --validity`.

The kernels that look into the catalogue with the mask and without, both with prefix tables, as far as the plan has
them, and with nothing but binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.rows import Row

if TYPE_CHECKING:
    from benchmarks.kernel_rows import Recorder
    from nezha_vllm.triton_search import Plan

CHECKED = ("score_children", "select_beams")  # the second looks up where the keys of a child begin and end


def measure_validity(recorder: Recorder) -> None:
    from benchmarks.kernels import plans
    from benchmarks.search_case import random_head

    arguments = recorder.arguments
    head = random_head(recorder.sizes, arguments.hidden, recorder.dtype)
    for items in arguments.items:
        for where, plan in plans(recorder, head, items):
            with_tables = f"tables at levels {tabled(plan)}"
            lookups = ((with_tables, plan), ("binary search", without_tables(head, plan)))
            for (lookup, changed), width, batch in product(lookups, arguments.widths, arguments.batches):
                guarded(recorder, changed, lookup, where | {"beam_width": width, "concurrency": batch})
            del plan, changed, lookups


def guarded(recorder: Recorder, plan: Plan, lookup: str, cell: dict[str, Any]) -> None:
    """One cell; what fails, or comes too late, leaves a row with a note."""
    if recorder.late():
        recorder.add("triton", "draft stage", **cell, note="skipped: the time is spent")
        return
    try:
        measure_cell(recorder, plan, lookup, cell)
    except RuntimeError as error:  # out of memory is one
        recorder.add("triton", "draft stage", **cell, note=str(error)[:160])
    torch.cuda.empty_cache()


def costs(rows: Sequence[Row]) -> list[Row]:
    """Rows of what the mask adds: stepwise minus final, of the stage and of each level's kernels, µs."""
    found: dict[tuple[object, ...], Row] = {}
    differences = []
    for row in rows:
        mode, _, lookup = row.settings.partition(", ")
        cell = (row.items, row.beam_width, row.concurrency, row.part, lookup)
        if mode == "stepwise":
            found[cell] = row
        elif masked := found.get(cell):
            us = (masked.us or 0) - (row.us or 0)
            cold = (masked.cold_us or 0) - (row.cold_us or 0)
            differences.append(replace(row, settings=lookup, us=us, cold_us=cold, launches=None))
    return differences


def without_tables(head: Any, plan: Plan) -> Plan:
    """The same plan with binary search at every level."""
    from nezha_vllm.triton_search import Plan

    class SearchOnly(Plan):
        def _table(self, num_prefixes: int, suffix: int) -> None:
            return None

    return SearchOnly(head, plan.keys)


def tabled(plan: Plan) -> str:
    """The levels whose prefixes are few enough for a table, such as 1-2."""
    levels = [str(number) for number, level in enumerate(plan.levels, 1) if level.table is not None]
    return "-".join([levels[0], levels[-1]] if len(levels) > 1 else levels) or "none"


def measure_cell(recorder: Recorder, plan: Plan, lookup: str, cell: dict[str, Any]) -> None:
    from benchmarks.gpu_timing import Flush, capture, median_us
    from benchmarks.kernels import part_times
    from benchmarks.search_case import SearchCase

    replays, flush = recorder.arguments.replays, Flush()
    for stepwise in (True, False):
        mode = "stepwise" if stepwise else "final"
        case = SearchCase(plan, cell["concurrency"], cell["beam_width"], stepwise)
        graph = capture(case)
        recorder.add(
            "triton",
            "draft stage",
            us=median_us(graph.replay, replays),
            cold_us=median_us(graph.replay, replays, flush),
            settings=f"{mode}, {lookup}",
            **cell,
        )
        warm, cold = part_times(case), part_times(case, flush)
        for (part, level), (us, launches) in warm.items():
            if part in CHECKED:
                recorder.add(
                    "triton",
                    f"{part} {level}",
                    us=us,
                    cold_us=cold[part, level][0],
                    launches=launches,
                    settings=f"{mode}, {lookup}",
                    **cell,
                )
