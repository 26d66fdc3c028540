"""What rules cost the draft stage on a GPU: `python -m benchmarks.rules --items 10000000`.

The same search of K beams without a rule and with each kind, as CUDA graphs in one process, and how long it takes to
make a combination of segments that was not asked for before. Every item has a semantic ID of its own.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.search_case import SearchCase, random_head, random_keys
from nezha_vllm.segment_ranks import SegmentRanks
from nezha_vllm.triton_search import ALL, ALL_BUT, Plan

SHARES = {"half": 0.5, "hundredth": 0.01}  # of the items, drawn at random, in each segment
LISTED = 10_000
COMBINATIONS = {"a segment of half": ((0,), ()), "a segment of 1 %": ((1,), ()), "half without the 1 %": ((0,), (1,))}


@dataclass(frozen=True)
class Rule:
    name: str
    kind: int
    positions: Tensor
    ranks_at: int = -1


def segments_of(num_keys: int, device: str) -> SegmentRanks:
    rng = np.random.default_rng(3)
    bits = [np.packbits(rng.random(num_keys) < share, bitorder="little") for share in SHARES.values()]
    return SegmentRanks(bits, np.arange(num_keys + 1), device)


def rules_of(segments: SegmentRanks) -> list[Rule]:
    """Excluded semantic IDs are spread over those that are left."""
    size, nothing = segments.size, segments.ranks[:0]
    everything = torch.arange(size - 1, dtype=torch.int32, device=nothing.device)
    rules = [Rule("no rule", ALL, nothing), Rule(f"{LISTED:,} excluded", ALL_BUT, spread(everything))]
    for name, combination in COMBINATIONS.items():
        at = segments.place(combination)
        assert at is not None
        ranks = segments.ranks[at : at + size]
        inside = everything[ranks[1:] > ranks[:-1]]
        rules.append(Rule(name, ALL_BUT, nothing, at))
        rules.append(Rule(f"{name}, {LISTED:,} excluded", ALL_BUT, spread(inside), at))
    return rules


def spread(positions: Tensor) -> Tensor:
    return positions[:: max(1, len(positions) // LISTED)][:LISTED].contiguous()


def case_of(plan: Plan, requests: int, width: int, rule: Rule, segments: SegmentRanks) -> SearchCase:
    case = SearchCase(plan, requests, width)
    case.positions = rule.positions
    case.catalogues = torch.tensor([plan.entry(segments.ranks)], device=segments.ranks.device)
    for options_8N in case.options:
        options_8N[3:7] = torch.tensor([[rule.kind], [0], [len(rule.positions)], [rule.ranks_at]])
    return case


def main() -> None:
    from benchmarks.gpu_timing import capture, median_us

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 512, 512], help="codebook sizes")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--widths", type=int, nargs="+", default=[50, 512])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    head = random_head(tuple(arguments.sizes), arguments.hidden, torch.bfloat16)
    plan = Plan(head, random_keys(arguments.items, int(np.prod(arguments.sizes))))
    segments = segments_of(plan.num_keys, "cuda")
    out = torch.empty_like(segments.ranks[: segments.size])
    made = median_us(lambda: segments.combine(((0,), (1,)), out), 20)
    print(f"{torch.cuda.get_device_name()}, {plan.num_keys:,} items; to make a combination {made / 1e3:.2f} ms")
    for requests in arguments.requests:
        for width in arguments.widths:
            print(f"{requests} requests, {width} beams")
            without = 0.0
            for rule in rules_of(segments):
                case = case_of(plan, requests, width, rule, segments)  # the graph reads its buffers
                graph = capture(case)
                took = median_us(graph.replay, 100)
                without = without or took
                print(f"  {rule.name:36} {took:9.1f} µs  {took / without - 1:+7.1%}")


if __name__ == "__main__":
    main()
