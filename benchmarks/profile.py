"""Where the time of one request goes: GPU kernels by part with their floors, and the steps of the host.

python -m benchmarks.profile --model nezha-llama1b --prompts 128 --beams 512:50 -- --max-model-len 2048

The engine runs in this process. Host steps are timed without a profiler; kernels in a second run with one. Rows go to
``profile.csv``; one request, kernel by kernel, to ``timeline-….json``, which ``benchmarks.tables`` draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import floors, timeline
from benchmarks.engines import System, open_system
from benchmarks.gpu_parts import PARTS, Kernel, backbone_work, draft_work, sort_kernels
from benchmarks.host_steps import HostSteps
from benchmarks.latency import engine_tokens
from benchmarks.machine import describe
from benchmarks.measure import Recorder, print_rows
from benchmarks.options import make_parser, parse
from benchmarks.workload import Cell, Workload

WARM_UPS = 20
SHOWN = {"part": "part", "prompt": "engine_tokens", "K": "beam_width", "n": "n", "µs": "us", "floor": "floor_us"}
SHOWN |= {"launches": "launches", "p50 ms": "p50_ms", "note": "note"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=200, help="timed on the host (default %(default)s)")
    parser.add_argument("--profiled", type=int, default=20, help="with kernels recorded (default %(default)s)")
    parser.set_defaults(over="in-process", beams=[(512, 50)])
    arguments = parse(parser, argv)
    workload = Workload.of(arguments.model)
    recorder = Recorder("profile", arguments, workload)
    ceilings = measured_ceilings(workload)  # while the memory is still free
    system = open_system("nezha", arguments.model, arguments.vllm_args, in_process=True)
    try:
        for prompt in arguments.prompts:
            for width, n in arguments.beams:
                profile_cell(recorder, system, Cell(prompt, width, n), ceilings)
    finally:
        print_rows(recorder.rows, f"profile, {arguments.label}", SHOWN)
        system.close()
    return 0


def measured_ceilings(workload: Workload) -> floors.Ceilings | None:
    if not torch.cuda.is_available():
        print("no GPU: only the steps of the host are measured", file=sys.stderr)
        return None
    from benchmarks.gpu_timing import ceilings

    found = ceilings(getattr(torch, workload.config.get("dtype", "bfloat16")))
    torch.cuda.empty_cache()
    return found


def profile_cell(recorder: Recorder, system: System, cell: Cell, ceilings: floors.Ceilings | None) -> None:
    arguments, workload = recorder.arguments, recorder.workload
    prompts = workload.token_ids(cell.prompt_tokens, arguments.seed)
    tokens = engine_tokens("nezha", cell, workload)
    columns: dict[str, Any] = {"load": "one", "concurrency": 1, "engine_tokens": tokens}

    def ask() -> None:
        system.answer([next(prompts)], cell)

    for _ in range(WARM_UPS):
        ask()
    steps = HostSteps()
    with steps.watching():
        for _ in range(arguments.requests):
            steps.request(ask)
    totals = [request.total_us for request in steps.requests]
    for step, (us, calls) in steps.medians().items():
        recorder.add("nezha", cell, **columns, part=f"host: {step}", us=us, launches=calls)
    recorder.add("nezha", cell, **columns, part="host: whole request", us=median(totals), requests=len(totals))
    if ceilings is not None:
        columns |= {"ceiling_gb_per_s": ceilings.gb_per_s, "ceiling_tflop_per_s": ceilings.tflop_per_s}
        try:
            profile_gpu(recorder, cell, ask, known_work(system, cell, tokens, workload), ceilings, columns)
        except RuntimeError as error:
            recorder.add("nezha", cell, **columns, part="gpu", note=str(error)[:200])


def profile_gpu(
    recorder: Recorder,
    cell: Cell,
    ask: Callable[[], None],
    works: dict[str, floors.Work],
    ceilings: floors.Ceilings,
    columns: dict[str, Any],
) -> None:
    requests = profiled_requests(ask, recorder.arguments.profiled)
    kernels = [found for _, found in requests]
    for part, us, launches in by_part(kernels):
        work = works.get(part)
        floor = None if work is None else work.floor_us(ceilings)
        recorder.add("nezha", cell, **columns, part=f"gpu: {part}", us=us, launches=launches, floor_us=floor)
    busy = median(sum(kernel.own for kernel in found) for found in kernels)
    span = median(max(kernel.start + kernel.us for kernel in found) - found[0].start for found in kernels)
    recorder.add("nezha", cell, **columns, part="gpu: all kernels", us=busy)
    recorder.add("nezha", cell, **columns, part="gpu: first start to last end", us=span)
    save_timeline(recorder, cell, requests)


def profiled_requests(ask: Callable[[], None], count: int) -> list[tuple[HostSteps, list[Kernel]]]:
    """Host steps and kernels of each of ``count`` requests, on one clock."""
    from torch.profiler import ProfilerActivity, profile

    steps = HostSteps()
    with steps.watching(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            steps.request(ask)
            torch.cuda.synchronize()
    zero = profiler.profiler.kineto_results.trace_start_ns() / 1000
    events = sorted(
        (zero + event.time_range.start, event.time_range.elapsed_us(), event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return list(_split(steps, events))


def _split(steps: HostSteps, events: list[tuple[float, float, str]]) -> Iterator[tuple[HostSteps, list[Kernel]]]:
    """Kernels of each request: all requests have the same ones, so an equal share each, in order."""
    each, left = divmod(len(events), len(steps.requests))
    if left:
        raise RuntimeError(f"{len(events)} kernels do not belong to {len(steps.requests)} equal requests")
    for number, request in enumerate(steps.requests):
        alone = HostSteps()
        alone.requests = [request]
        part = events[number * each : (number + 1) * each]
        yield alone, sort_kernels([(name, start, us) for start, us, name in part])


def known_work(system: Any, cell: Cell, tokens: int, workload: Workload) -> dict[str, floors.Work]:
    """Floors of the parts, from the served model itself."""
    from benchmarks.search_case import prefixes
    from nezha_vllm.search_memory import width_bucket

    [stage] = system.llm.collective_rpc(lambda worker: worker.model_runner.model_state.draft_stage)
    plan, config = next(iter(stage.versions)).beam_search.plan, SimpleNamespace(**workload.config)
    number_bytes = plan.weights.element_size()
    search = floors.Search(
        1, cell.beam_width, plan.codec.codebook_sizes, plan.hidden_size, number_bytes, prefixes(plan.keys, plan)
    )
    found = backbone_work(config, tokens, number_bytes) | draft_work(search, plan, width_bucket(cell.beam_width))
    return found | {"draft stage": floors.stage(search)}


def by_part(requests: Sequence[Sequence[Kernel]]) -> Iterator[tuple[str, float, float]]:
    """Part, median of its own µs a request, launches; the draft stage's kernels also together."""
    names = {kernel.part for kernels in requests for kernel in kernels}
    drafts = sorted(name for name in names if name.startswith("draft: "))
    groups = {part: {part} for part in (*PARTS, *drafts) if part in names}
    if drafts:
        groups["draft stage"] = set(drafts)
    for part, members in groups.items():
        chosen = [[kernel.own for kernel in kernels if kernel.part in members] for kernels in requests]
        yield part, median(map(sum, chosen)), sum(map(len, chosen)) / len(chosen)


def save_timeline(recorder: Recorder, cell: Cell, requests: list[tuple[HostSteps, list[Kernel]]]) -> None:
    """The request of median length, µs from its start."""
    order = sorted(requests, key=lambda found: found[0].requests[0].total_us)
    steps, kernels = order[len(order) // 2]
    spans = steps.requests[0].spans
    zero = min([span.start / 1000 for span in spans] + [kernels[0].start])
    file = recorder.arguments.results / f"{timeline.name_of(recorder.arguments.label, cell)}.json"
    content = {
        **describe(),
        "model": recorder.arguments.label,
        "prompt_tokens": recorder.rows[-1].engine_tokens,
        "beam_width": cell.beam_width,
        "n": cell.n,
        "steps": [[span.step, span.start / 1000 - zero, span.end / 1000 - zero, span.depth] for span in spans],
        "kernels": [[kernel.part, kernel.start - zero, kernel.start + kernel.us - zero] for kernel in kernels],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
