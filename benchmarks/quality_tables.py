"""Tables of the quality rows, as Markdown.

python -m benchmarks.quality_tables                                        the main tables, to the terminal
python -m benchmarks.quality_tables --ranks work/ranks                     … with NEZHA's distance from each
python -m benchmarks.quality_tables --document docs/quality.md             all tables between its marks, and pictures
python -m benchmarks.quality_tables --plans                                rows of all plans that there ever were

Figures are means over seeds (lowest – highest). Intervals are those of a paired bootstrap over users, each with the
mean of its seeds; a seed counts if both methods have it. They are kept in benchmarks/results/quality-gaps.csv, and come
from there where no ranks are given. Only rows of the plans' runs are shown, so options that were changed have no row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import quality_claims, quality_curves
from benchmarks.machine import ROOT
from benchmarks.markdown import table
from benchmarks.quality_gaps import METRICS as GAP_METRICS
from benchmarks.quality_gaps import Gap, gaps, kept_at
from benchmarks.quality_minutes import TRAINING, gpu_minutes, total
from benchmarks.quality_plan import Plan
from benchmarks.quality_rows import (
    NO_SCORES,
    NO_TOKENS,
    OURS,
    OVER_CATALOGUE,
    SHORT_HISTORIES,
    UNVERIFIED,
    Result,
    planned,
    read,
    read_all,
    spread,
)
from benchmarks.rows import RESULTS
from benchmarks.tables import fill
from nezha_vllm.ablations import FREE_LABEL, LABELS
from nezha_vllm.training.comparison import BASELINES

METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10", "hit@500", "valid")
HEADS = ("Hit@5", "Hit@10", "NDCG@5", "NDCG@10", "Hit@500", "valid beams", "GPU minutes")
ORDER = [*BASELINES.values(), FREE_LABEL, LABELS["ar"], LABELS["mtp"], *(LABELS[f"nezha-{n}"] for n in (1, 2, 3))]
ORDER += [UNVERIFIED, OURS]
VARIANTS = [less + softmax for less in ("", SHORT_HISTORIES, NO_SCORES, NO_TOKENS) for softmax in ("", OVER_CATALOGUE)]
ORDER = [f"{method}{variant}" for method in ORDER for variant in VARIANTS]
PLANS = ROOT / "benchmarks" / "plans"
LEVELS = PLANS / "quality-curves.toml"
PICTURES = {
    "widths": "Hit@10 and the share of valid beams over beam width",
    "levels": "Hit@10, NDCG@10 and the share of valid beams over level sizes",
    "time": "NDCG@10 of the validation items over minutes of training",
}
Minutes = quality_curves.Minutes


def main_table(results: Sequence[Result], dataset: str, minutes: Minutes) -> str:
    """All methods on a data set, baselines first, then model by model; minutes are the least of its seeds."""
    lines = []
    for model, method in _rows(results, dataset):
        group = [one for one in results if one.group == (dataset, model, method)]
        cells = [spread([one.number(name) for one in group]) for name in METRICS]
        trained = [minutes[one.run, TRAINING] for one in group if (one.run, TRAINING) in minutes]
        least = f"{min(trained):.2f}" if trained else "–"
        lines.append([method, model or "–", str(len(group)), *cells, least])
    return table(["", "backbone", "seeds", *HEADS], lines, left=2)


def differences(found: Sequence[Gap], dataset: str) -> str:
    """NEZHA minus each method of its model, each baseline, and NEZHA of the model with most rows."""
    here = [gap for gap in found if gap.dataset == dataset]
    here.sort(key=lambda gap: (gap.model, _place(gap.method)))
    lines = [
        [gap.method, gap.model, str(gap.seeds), *(quality_claims.interval(gap.by[name]) for name in GAP_METRICS)]
        for gap in here
    ]
    return table([f"{OURS} minus …", "backbone", "seeds", *GAP_METRICS], lines, left=2) if lines else ""


def _place(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def _rows(results: Sequence[Result], dataset: str) -> list[tuple[str, str]]:
    groups = dict.fromkeys((one.model, one.method) for one in results if one.dataset == dataset)
    return sorted(groups, key=lambda group: (group[0], _place(group[1]), group[1]))


def make(results: Sequence[Result], found: Sequence[Gap] = (), minutes: Minutes | None = None) -> str:
    """The main tables, a heading a data set."""
    minutes = minutes or {}
    parts = []
    for dataset in dict.fromkeys(one.dataset for one in results):
        here = [one for one in results if one.dataset == dataset]
        commits = ", ".join(dict.fromkeys(one.row["commit"] for one in here if one.row["commit"]))
        newest = [one.row for one in here if one.model] or [one.row for one in here]
        kept = "left out" if newest[-1]["exclude_history"] == "True" else "kept in the ranking"
        said = (
            f"{int(newest[-1]['targets']):,} users, all {int(newest[-1]['items']):,} items ranked, "
            f"those of the history {kept}; beam width {newest[-1]['beam_width']}; ties: {newest[-1]['ties']}; "
            f"commit {commits}{spent(here, minutes)}."
        )
        parts += [f"### {dataset}", said, main_table(results, dataset, minutes)]
        gap = differences(found, dataset)
        parts += [gap] if gap else []
    return "\n\n".join(parts)


def spent(rows: Sequence[Result], minutes: Minutes) -> str:
    """In words, behind a comma: the GPU minutes of the rows' runs; nothing where they are not known."""
    runs = {one.run for one in rows}
    whole, training = total(minutes, runs), total(minutes, runs, TRAINING)
    devices = dict.fromkeys(one.config["device"] for one in rows if one.config.get("device", "cpu") != "cpu")
    on = f" of {', '.join(devices)}" if devices else ""
    return f"; {whole:.1f} GPU minutes{on}, {training:.1f} of them training" if whole else ""


def sections(arguments: argparse.Namespace) -> tuple[dict[str, str], list[Path]]:
    """Every table, by the name of its mark; draws the pictures, and removes those that have no rows now."""
    from benchmarks.quality_plots import draw_all

    rows, only = read_all(arguments.results), planned(arguments.plans) if arguments.plans else None
    minutes = gpu_minutes(rows)
    results = read(arguments.results, only=only)
    found = gaps(results, arguments.ranks, kept_at(arguments.results))
    planned_rows = [one for one in rows if only is None or one.run in only]
    widths = quality_curves.width_rows(planned_rows)
    of_levels = read(arguments.results, only=planned([arguments.levels]))
    levels = quality_curves.level_rows(of_levels, Plan.load(arguments.levels))
    times = quality_curves.time_lines(results, minutes)
    timed = [one for one in rows if "latency" in one.config]

    images = arguments.document.parent / "images"
    pictures = draw_all(images, widths, levels, times, quality_curves.origin(results)) if results or levels else []

    def section(name: str, text: str, shown: Sequence[Result]) -> str:
        path = images / f"quality-{name}.svg"
        picture = f"![{PICTURES[name]}](images/{path.name})\n\n" if path in pictures else ""
        return f"{picture}{text}\n\n{quality_curves.origin(shown).capitalize()}{spent(shown, minutes)}." if text else ""

    tables = {
        "quality": make(results, found, minutes),
        "quality-sacrifice": quality_claims.sacrifice_tables(found),
        "quality-published": quality_claims.published_table(results),
        "quality-backbones": quality_claims.backbones_table(results),
        "quality-widths": section("widths", quality_curves.width_table(widths), widths),
        "quality-levels": section("levels", quality_curves.level_table(levels), of_levels),
        "quality-time": section("time", quality_curves.time_table(times), quality_curves.of_most_rows(results)),
        "quality-latency": section("latency", quality_curves.latency_table(timed), timed),
        "quality-search": quality_curves.search_table(rows),
    }
    for name in PICTURES:
        path = images / f"quality-{name}.svg"
        if path not in pictures:
            path.unlink(missing_ok=True)
    return {name: text or "No rows yet." for name, text in tables.items()}, pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", metavar="FILE")
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--plans", type=Path, nargs="*", default=[PLANS / "quality.toml"], metavar="PLAN")
    parser.add_argument("--levels", type=Path, default=LEVELS, metavar="PLAN", help="of the level sizes")
    parser.add_argument("--ranks", type=Path, metavar="DIR", help="WORK/ranks of benchmarks.quality, for intervals")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write all of it between its marks, and draw")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_file():
        parser.error(f"no results at {arguments.results}; make them with python -m benchmarks.quality")
    if arguments.document:
        tables, pictures = sections(arguments)
        print(f"{arguments.document.name}: {', '.join(fill(arguments.document, tables)) or 'no marks'}")
        for picture in pictures:
            print(picture)
    else:
        only = planned(arguments.plans) if arguments.plans else None
        results = read(arguments.results, arguments.split, only)
        found = gaps(results, arguments.ranks, kept_at(arguments.results))
        print(make(results, found, gpu_minutes(read_all(arguments.results))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
