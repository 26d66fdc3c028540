"""The draft stage on a GPU beside its floor and the PyTorch reference: as a whole, and kernel by kernel.

python -m benchmarks.kernels --widths 10 50 512 4096 --batches 1 16 64
python -m benchmarks.kernels --items 10000 57288 1000000 100000000 --widths 512 --batches 1
python -m benchmarks.kernels --widths 512 --batches 1 --references eager compiled --no-parts
python -m benchmarks.kernels --widths 512 --batches 1 64 --item-tokens 0 57288
python -m benchmarks.kernels --validity --items 57288 100000000

The whole stage is the CUDA graph that serving replays, between two CUDA events; its kernels' own durations are the
profiler's, without the gaps between them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import floors
from benchmarks.kernel_rows import Recorder
from benchmarks.rows import ITEM_TOKENS, RESULTS

if TYPE_CHECKING:
    from benchmarks.search_case import SearchCase
    from nezha_vllm.triton_search import Plan

NEEDS_GPU = "this measures kernels on an NVIDIA GPU, and PyTorch finds none here"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[10, 50, 512, 4096], metavar="K")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], metavar="N", help="requests at once")
    parser.add_argument("--items", nargs="+", type=int, default=[57_288], metavar="M")
    scores = "with item scores of so many items; 0: without"
    parser.add_argument("--item-tokens", nargs="+", type=int, default=[0], metavar="I", help=scores)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codes", type=int, default=512, help="of each level (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--references", nargs="*", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="only the stage as a whole")
    parser.add_argument("--validity", action="store_true", help="only what validity costs each level")
    parser.add_argument("--replays", type=int, default=50, help="of each graph (default %(default)s)")
    parser.add_argument("--budget", type=float, default=420, metavar="S", help="seconds, then cells are skipped")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rows go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(NEEDS_GPU)
    recorder = Recorder(arguments)
    try:
        if arguments.validity:
            from benchmarks.validity import measure_validity

            measure_validity(recorder)
        else:
            measure_grid(recorder)
    finally:
        recorder.print()
    return 0


def measure_grid(recorder: Recorder) -> None:
    """Items, then item tokens, widths and batches: what has the same K shares its compiled kernels."""
    from benchmarks.search_case import random_head

    arguments = recorder.arguments
    head = random_head(recorder.sizes, arguments.hidden, recorder.dtype)
    for items in arguments.items:
        for known in sorted({min(known, items) for known in arguments.item_tokens}):
            for where, plan in plans(recorder, head, items, known):
                for width, batch in product(arguments.widths, arguments.batches):
                    guarded(recorder, head, plan, where | {"beam_width": width, "concurrency": batch})
                del plan


def plans(recorder: Recorder, head: Any, items: int, known: int) -> Iterator[tuple[dict[str, Any], Plan]]:
    """The plan of so many items, of which ``known`` have a token, or a row that says why there is none.

    The same ``items`` are the same catalogue, whatever is known of it.
    """
    from benchmarks.search_case import every, random_items, random_keys
    from nezha_vllm.triton_search import Plan

    where: dict[str, Any] = {"items": items}
    if known:
        where["settings"] = f"{known}{ITEM_TOKENS}"
    if recorder.late():
        recorder.add("triton", "draft stage", **where, note="skipped: the time is spent")
        return
    try:
        keys = random_keys(items, math.prod(recorder.sizes))
        plan = Plan(head, keys, random_items(head, every(keys, known)) if known else None)
    except (torch.OutOfMemoryError, ValueError) as error:
        recorder.add("triton", "draft stage", **where, note=f"skipped: {str(error)[:120]}")
        return
    yield where, plan


def guarded(recorder: Recorder, head: Any, plan: Plan, cell: dict[str, Any]) -> None:
    """One cell; what does not fit, or comes too late, leaves a row with a note."""
    if recorder.late():
        recorder.add("triton", "draft stage", **cell, note="skipped: the time is spent")
        return
    try:
        measure_cell(recorder, head, plan, cell)
    except torch.OutOfMemoryError as error:
        recorder.add("triton", "draft stage", **cell, note=f"skipped: {str(error)[:120]}")
    torch.cuda.empty_cache()


def measure_cell(recorder: Recorder, head: Any, plan: Plan, cell: dict[str, Any]) -> None:
    from benchmarks.gpu_timing import Flush, capture, median_us
    from benchmarks.search_case import SearchCase, prefixes

    arguments = recorder.arguments
    case = SearchCase(plan, cell["concurrency"], cell["beam_width"])
    shape = search_shape(case, recorder, prefixes(plan.keys, plan))
    graph, flush = capture(case), Flush()
    recorder.add(
        "triton",
        "draft stage",
        work=floors.stage(shape),
        us=median_us(graph.replay, arguments.replays),
        cold_us=median_us(graph.replay, arguments.replays, flush),
        **cell,
        note=f"{len(case.options)} launches of {case.step} requests" if len(case.options) > 1 else "",
    )
    if arguments.parts and len(case.options) == 1:
        try:
            measure_parts(recorder, case, shape, cell)
        except RuntimeError as error:
            recorder.add("triton", "kernels", **cell, note=str(error)[:160])
    for kind in arguments.references:
        measure_reference(recorder, head, case, shape, cell, kind)


def search_shape(case: SearchCase, recorder: Recorder, known: tuple[int, ...]) -> floors.Search:
    arguments, items = recorder.arguments, case.plan.items
    share = None if items is None else len(items.scores.keys) / case.plan.num_keys
    shape = case.requests, case.width, recorder.sizes, arguments.hidden, recorder.dtype.itemsize
    return floors.Search(*shape, known, share)


def measure_parts(recorder: Recorder, case: SearchCase, shape: floors.Search, cell: dict[str, Any]) -> None:
    """Rows of the kernels, those of one level that do one thing together."""
    from benchmarks.gpu_timing import Flush
    from benchmarks.search_case import work_of

    warm = part_times(case)
    cold = part_times(case, Flush())
    for (part, level), (us, launches) in warm.items():
        recorder.add(
            "triton",
            f"{part} {level}",
            work=work_of(part, level, shape, case),
            us=us,
            cold_us=cold[part, level][0],
            launches=launches,
            **cell,
        )


def part_times(case: SearchCase, before: Any = None) -> dict[tuple[str, int], tuple[float, int]]:
    """µs and launches of each part of one launch of the search, by (part, level)."""
    from benchmarks.gpu_timing import capture, kernel_us
    from benchmarks.search_case import label

    found = kernel_us(capture(case.one_launch).replay, before=before)
    times: dict[tuple[str, int], list[float]] = {}
    for part, (_, us) in zip(label(name for name, _ in found), found, strict=True):
        times.setdefault(part, []).append(us)
    return {part: (sum(found), len(found)) for part, found in times.items()}


def measure_reference(
    recorder: Recorder, head: Any, case: SearchCase, shape: floors.Search, cell: dict[str, Any], kind: str
) -> None:
    """PyTorch's turn: at least three calls, at most as many as take a few seconds; a failure becomes a note."""
    from benchmarks.gpu_timing import median_us
    from benchmarks.search_case import reference

    system = "pytorch" if kind == "eager" else "pytorch, compiled"
    try:
        run = reference(head, case.plan.keys, case, compiled=kind == "compiled")
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls = min(recorder.arguments.replays, max(3, int(2 / (time.perf_counter() - start))))
        us = median_us(run, calls)
    except Exception as error:  # whatever torch.compile or the memory says is a finding
        recorder.add(system, "draft stage", **cell, note=f"{type(error).__name__}: {str(error)[:160]}")
        return
    recorder.add(system, "draft stage", work=floors.stage(shape), us=us, **cell)


if __name__ == "__main__":
    sys.exit(main())
