"""What each option of the search gains over the base, on each data set and in the mean.

python -m benchmarks.quality_gains benchmarks/plans/quality-search.toml [--results FILE] [--metric ndcg@10]

A gain is relative, in percent of the base of the same data set and method of the plan, means over seeds; item tokens
and softmax are options like others. Indexes, which are data sets of their own, are set against the base of the data set
with the same sequences on which most was tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.quality_plan import Places, Plan, runs
from benchmarks.quality_rows import Result, read
from benchmarks.rows import RESULTS

BASE = "base"


def gains(results: Sequence[Result], metric: str) -> list[tuple[str, str, dict[str, float]]]:
    """Option (or index), method, and gain by data set (by sequences), the highest mean first."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for one in results:
        if one.model:  # no baselines
            key = one.row["data_hash"], one.dataset, one.run.split("/")[1], one.planned_method
            groups.setdefault(key, []).append(one.number(metric))
    bases: dict[tuple[str, str], tuple[str, float]] = {}
    for (data, dataset, option, method), values in sorted(groups.items(), key=lambda item: len(item[0][1])):
        if option == BASE and _is_first(dataset, data, groups):
            bases.setdefault((data, method), (dataset, fmean(values)))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (data, dataset, option, method), values in groups.items():
        if (data, method) in bases and (dataset, option) != (bases[data, method][0], BASE):
            first, base = bases[data, method]
            name = option if dataset == first else f"{dataset}, {option}"
            found.setdefault((name, method), {})[first] = 100 * (fmean(values) / base - 1)
    lines = [(name, method, by_data) for (name, method), by_data in found.items()]
    return sorted(lines, key=lambda line: -fmean(line[2].values()))


def _is_first(dataset: str, data: str, groups: dict) -> bool:
    """Whether most options were tried on this data set, of those with the same sequences."""
    tried = {name: sum(key[:2] == (data, name) for key in groups) for hashed, name, _, _ in groups if hashed == data}
    return tried[dataset] == max(tried.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="whose runs count; older ones of other options do not")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", metavar="FILE")
    parser.add_argument("--metric", default="ndcg@10", metavar="NAME")
    arguments = parser.parse_args(argv)
    planned = {job.name for job in runs(Plan.load(arguments.plan), Places(Path(), Path(), arguments.results))}
    lines = gains(read(arguments.results, "valid", planned), arguments.metric)
    names = list(dict.fromkeys(name for _, _, by_data in lines for name in by_data))
    cells = [
        [option, method, *(f"{by[name]:+.1f}" if name in by else "" for name in names), f"{fmean(by.values()):+.1f}"]
        for option, method, by in lines
    ]
    print(table(["option", "method", *names, "mean, %"], cells, left=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
