"""Tables of the quality rows, as Markdown.

python -m benchmarks.quality_tables                                        to the terminal
python -m benchmarks.quality_tables --ranks work/ranks                     with NEZHA's distance from each
python -m benchmarks.quality_tables --document docs/quality.md             between that page's marks, and its picture

Figures are means over seeds (lowest – highest). Intervals are those of a paired bootstrap over users, each with the
mean of its seeds; a seed counts if both methods have it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.quality_curves import curve_rows, curve_table, draw_curve, search_table
from benchmarks.quality_plan import ALONE, CURVE, PARTS_OF_A_RUN
from benchmarks.rows import RESULTS
from benchmarks.tables import fill
from nezha_vllm.ablations import FREE_LABEL, LABELS
from nezha_vllm.training.comparison import BASELINES
from nezha_vllm.training.metrics import gains, hits
from nezha_vllm.training.results import load_ranks
from nezha_vllm.training.significance import paired_bootstrap

METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10", "hit@500", "valid")
HEADS = ("Hit@5", "Hit@10", "NDCG@5", "NDCG@10", "Hit@500", "valid beams", "ranking, ms a user", "training, min")
UNVERIFIED = "NEZHA-4, no verification"
OURS = LABELS["nezha"]
ORDER = [*BASELINES.values(), FREE_LABEL, LABELS["ar"], LABELS["mtp"], *(LABELS[f"nezha-{n}"] for n in (1, 2, 3))]
ORDER += [UNVERIFIED, OURS]


@dataclass(frozen=True)
class Result:
    """A line of the results file, as the tables group it; ``model``, with its epochs, is empty for baselines."""

    dataset: str
    model: str
    method: str
    seed: int
    run: str
    row: Mapping[str, str]

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Result:
        config = json.loads(row["config"] or "{}")
        model = ""
        if "family" in config:
            shape = f"{config['family']}, {config['layers']} layers of {config['hidden']}"
            planned = row["run"].split("/")
            model = planned[1] if len(planned) == PARTS_OF_A_RUN else shape
            model += f", {config['epochs']} epochs"  # one table never compares unequal budgets
        unverified = row["method"] == OURS and row["validity"] == "final"
        return cls(
            row["dataset"],
            model,
            UNVERIFIED if unverified else row["method"],
            int(row["seed"]),
            row["run"],
            row,
        )

    def number(self, name: str) -> float | None:
        if name == "ms":
            return 1000 * float(self.row["seconds"]) / int(self.row["targets"]) if self.model else None
        if name == "minutes":
            seconds = json.loads(self.row["config"] or "{}").get("train_seconds")
            return None if seconds is None else seconds / 60
        return float(self.row[name]) if self.row[name] else None


def read(path: Path, split: str = "test") -> list[Result]:
    """Results of a split, one a data set, model, method and seed: the newest."""
    with path.open(newline="", encoding="utf-8") as file:
        found = [Result.of(row) for row in csv.DictReader(file) if row["split"] == split]
    found = [one for one in found if CURVE not in one.run and ALONE not in one.run]
    newest = {(one.dataset, one.model, one.method, one.seed): one for one in found}
    return list(newest.values())


def main_table(results: Sequence[Result], dataset: str) -> str:
    """All methods on a data set, baselines first, then model by model."""
    lines = []
    for model, method in _rows(results, dataset):
        group = [one for one in results if (one.dataset, one.model, one.method) == (dataset, model, method)]
        cells = [_spread([one.number(name) for one in group]) for name in METRICS]
        cells += [_mean([one.number(name) for one in group], digits) for name, digits in (("ms", 2), ("minutes", 1))]
        lines.append([method, model or "–", str(len(group)), *cells])
    return table(["", "backbone", "seeds", *HEADS], lines, left=2)


def differences(results: Sequence[Result], dataset: str, ranks: Path) -> str:
    """NEZHA minus each method of its model, and minus each baseline, where the ranks are there."""
    lines = []
    models = dict.fromkeys(one.model for one in results if one.dataset == dataset and one.model)
    for model in models:
        ours = _ranks_by_seed(results, dataset, model, OURS, ranks)
        for group, method in _rows(results, dataset):
            if group not in ("", model) or method == OURS:
                continue
            theirs = _ranks_by_seed(results, dataset, group, method, ranks)
            once = len(theirs) == 1 and not group  # a baseline without seeds stands against all of ours
            seeds = list(ours) if once else [seed for seed in ours if seed in theirs]
            if not seeds or not theirs:
                continue
            cells = []
            for per_user in (hits, gains):
                for k in (5, 10):
                    mine = sum(per_user(ours[seed], k) for seed in seeds) / len(seeds)
                    other = sum(per_user(next(iter(theirs.values())) if once else theirs[seed], k) for seed in seeds)
                    gap = paired_bootstrap(mine, other / len(seeds))
                    cells.append(f"{gap.mean:+.4f} ({gap.low:+.4f} … {gap.high:+.4f})")
            lines.append([method, model, str(len(seeds)), *cells])
    heads = [f"{OURS} minus …", "backbone", "seeds", "Hit@5", "Hit@10", "NDCG@5", "NDCG@10"]
    return table(heads, lines, left=2) if lines else ""


def _rows(results: Sequence[Result], dataset: str) -> list[tuple[str, str]]:
    groups = dict.fromkeys((one.model, one.method) for one in results if one.dataset == dataset)
    place = {name: at for at, name in enumerate(ORDER)}
    return sorted(groups, key=lambda group: (group[0], place.get(group[1], len(place)), group[1]))


def _ranks_by_seed(results: Iterable[Result], dataset: str, model: str, method: str, folder: Path) -> dict:
    found = {}
    for one in results:
        path = folder / f"{one.run.replace('/', '-')}.npz"
        if (one.dataset, one.model, one.method) == (dataset, model, method) and path.is_file():
            found[one.seed] = load_ranks(path)[one.row["method"]]
    return found


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "–"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known):
        return _mean(values, 4)
    return f"{fmean(known):.4f} ({min(known):.4f} – {max(known):.4f})"


def make(results: Sequence[Result], ranks: Path | None) -> str:
    """All tables, a heading a data set."""
    parts = []
    for dataset in dict.fromkeys(one.dataset for one in results):
        newest = [one.row for one in results if one.dataset == dataset]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in newest if row["commit"]))
        kept = "left out" if newest[-1]["exclude_history"] == "True" else "kept in the ranking"
        said = (
            f"{int(newest[-1]['targets']):,} users, all {int(newest[-1]['items']):,} items ranked, "
            f"those of the history {kept}; beam width {newest[-1]['beam_width']}; ties: {newest[-1]['ties']}; "
            f"commit {commits}."
        )
        parts += [f"### {dataset}", said, main_table(results, dataset)]
        gaps = differences(results, dataset, ranks) if ranks else ""
        parts += [gaps] if gaps else []
    return "\n\n".join(parts)


def draw(rows: Sequence[Mapping[str, str]], document: Path) -> Path:
    """The picture of the beam widths, among the document's images."""
    from benchmarks.plots import STYLE, plt, save

    with plt.rc_context(STYLE):
        return save(draw_curve(rows), document.parent / "images" / "quality-widths.svg")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", metavar="FILE")
    parser.add_argument("--split", choices=("test", "valid"), default="test")
    parser.add_argument("--ranks", type=Path, metavar="DIR", help="WORK/ranks of benchmarks.quality, for intervals")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write all of it between its marks, and draw")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_file():
        parser.error(f"no results at {arguments.results}; make them with python -m benchmarks.quality")
    if arguments.document:
        found, curve = read(arguments.results), curve_rows(arguments.results)
        tables = {
            "quality": make(found, arguments.ranks),
            "quality-widths": curve_table(curve),
            "quality-search": search_table(read(arguments.results, "valid")),
        }
        print(f"{arguments.document.name}: {', '.join(fill(arguments.document, tables)) or 'no marks'}")
        if curve:
            print(draw(curve, arguments.document))
    else:
        print(make(read(arguments.results, arguments.split), arguments.ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
