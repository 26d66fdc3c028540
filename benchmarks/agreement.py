"""How much two settings of the engine agree on the ranking: bfloat16 and FP8, eager and graphs, two attentions.

python -m benchmarks.agreement --model llama-1b --beams 512:50 --against "--quantization fp8" -- --max-model-len 2048

The same prompts are answered with what follows ``--`` and with ``--against`` behind it. A row says which share of the
ten best and of all items both have, and how far the scores of those are apart. Models with random weights have many
items of nearly one score, so they agree less than trained ones.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import islice
from statistics import fmean

from benchmarks.engines import open_system
from benchmarks.measure import Recorder
from benchmarks.options import make_parser, parse
from benchmarks.workload import Cell, Workload

Ranking = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--against", required=True, metavar="FLAGS", help="further flags of vLLM, in one word")
    parser.add_argument("--count", type=int, default=256, metavar="N", help="prompts (default %(default)s)")
    parser.set_defaults(over="offline", beams=[(512, 50)])
    arguments = parse(parser, argv)
    workload = Workload.of(arguments.model)
    recorder = Recorder("agreement", arguments, workload)
    cells = [Cell(prompt, *beams) for prompt in arguments.prompts for beams in arguments.beams]
    both = [
        answers(arguments.model, [*arguments.vllm_args, *more], cells, workload, arguments)
        for more in ([], shlex.split(arguments.against))
    ]
    for cell, one, other in zip(cells, *both, strict=True):
        row = recorder.add("nezha", cell, requests=len(one), note=said(one, other, arguments.against))
        print(f"{cell}: {row.note}")
    return 0


def answers(
    model: str, flags: Sequence[str], cells: Sequence[Cell], workload: Workload, arguments: Namespace
) -> list[list[Ranking]]:
    """Of each cell, of each prompt: item → score, best first. The engine is in its own process, and ends with this."""
    system = open_system("nezha", model, flags, in_process=False)
    try:
        found = []
        for cell in cells:
            prompts = list(islice(workload.token_ids(cell.prompt_tokens, arguments.seed), arguments.count))
            outputs = system.answer(prompts, cell)
            found.append([{item.text: item.cumulative_logprob for item in one.outputs} for one in outputs])
        return found
    finally:
        system.close()


def said(one: Sequence[Ranking], other: Sequence[Ranking], against: str) -> str:
    """Shares and distances of two lists of rankings of the same prompts."""

    def shared(depth: int) -> float:
        tops = [(set(islice(a, depth)), set(islice(b, depth))) for a, b in zip(one, other, strict=True)]
        return fmean(len(a & b) / len(a) for a, b in tops)

    apart = [abs(a[item] - b[item]) for a, b in zip(one, other, strict=True) for item in a.keys() & b.keys()]
    first = fmean(next(iter(a)) == next(iter(b)) for a, b in zip(one, other, strict=True))
    distance = f"scores {fmean(apart):.4f} apart in the mean, {max(apart):.4f} at most" if apart else "no item in both"
    every = shared(max(map(len, one)))
    return f"{against}: first item {first:.3f}, ten best {shared(10):.3f}, all {every:.3f}; {distance}"


if __name__ == "__main__":
    sys.exit(main())
