"""Quality over beam width, over level sizes and over training time, latency beside quality, and the search.

Written and drawn by ``benchmarks.quality_tables``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.quality_minutes import TRAINING
from benchmarks.quality_plan import CURVE, Plan
from benchmarks.quality_rows import NO_SCORES, NO_TOKENS, OURS, UNVERIFIED, Result, main_models, mean
from nezha_vllm.ablations import LABELS
from nezha_vllm.cli.tokenize import codebook_sizes

MODES = ("stepwise", "final")
SEARCHED = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")
TRAINED = (OURS, LABELS["ar"], LABELS["mtp"], LABELS["nezha-1"])  # what has a line in the pictures
TRAINED += tuple(f"{method}{less}" for less in (NO_SCORES, NO_TOKENS) for method in (OURS, LABELS["ar"]))
QUARTERS = (0.25, 0.5, 0.75, 1.0)
Minutes = Mapping[tuple[str, str], float]


def width_rows(results: Sequence[Result]) -> list[Result]:
    """Test rows of the beam widths, narrow first, with the width of the main table; of each data set's newest run."""
    curve = [one for one in results if CURVE in one.run and one.row["split"] == "test"]
    newest = {one.dataset: one.run.partition(CURVE)[0] for one in curve}
    found = {}
    for one in results:
        base = newest.get(one.dataset)
        of_base = base and (one.run.startswith(f"{base}{CURVE}") or one.run in (base, f"{base}-final"))
        if of_base and one.method in (OURS, UNVERIFIED):
            found[one.dataset, int(one.row["beam_width"]), one.row["validity"]] = one
    return [found[key] for key in sorted(found)]


def width_table(rows: Sequence[Result]) -> str:
    """A line a data set and width: what is found, and the share of valid beams, with either validity."""
    lines = []
    for dataset, width in dict.fromkeys((one.dataset, int(one.row["beam_width"])) for one in rows):
        cells = {
            one.row["validity"]: one for one in rows if (one.dataset, int(one.row["beam_width"])) == (dataset, width)
        }
        figures = [
            mean([cells[mode].number(name)] if mode in cells else [])
            for name in ("hit@10", "ndcg@10", "valid")
            for mode in MODES
        ]
        lines.append([dataset, f"{width:,}", *figures])
    heads = [f"{name}, {mode}" for name in ("Hit@10", "NDCG@10", "valid beams") for mode in MODES]
    return table(["data set", "beam width", *heads], lines, left=1) if lines else ""


def level_rows(results: Sequence[Result], plan: Plan) -> dict[str, dict[str, list[Result]]]:
    """Level sizes, as ``3 × 256``, → method → rows of the plan's data sets that say how many codes they have."""
    found: dict[str, dict[str, list[Result]]] = {}
    for dataset, spec in plan.datasets.items():
        words = spec.get("tokenize", [])
        rows = [one for one in results if one.dataset == dataset]
        if "--codes" in words and rows:
            sizes = codebook_sizes(words[words.index("--codes") + 1], None)
            name = f"{len(sizes)} × {sizes[0]}" if len(set(sizes)) == 1 else " × ".join(map(str, sizes))
            found[name] = {method: [one for one in rows if one.method == method] for method in (OURS, UNVERIFIED)}
    return found


def level_table(rows: Mapping[str, Mapping[str, Sequence[Result]]]) -> str:
    lines = []
    for name, by in rows.items():
        ours, free = by[OURS], by[UNVERIFIED]
        figures = [mean([one.number(metric) for one in ours]) for metric in (*SEARCHED, "hit@500")]
        figures += [mean([one.number(metric) for one in free]) for metric in ("hit@10", "valid")]
        parameters = f"{ours[0].config['parameters']:,}" if ours else "–"
        lines.append([name, str(len(ours)), parameters, *figures])
    heads = ["levels × codes", "seeds", "parameters", "Hit@5", "Hit@10", "NDCG@5", "NDCG@10", "Hit@500"]
    return table([*heads, "Hit@10, final", "valid beams, final"], lines, left=1) if lines else ""


def of_most_rows(results: Sequence[Result]) -> list[Result]:
    """Of each data set those of the model with most rows."""
    mains = main_models(results)
    return [one for one in results if one.model and one.model == mains[one.dataset]]


def time_lines(results: Sequence[Result], minutes: Minutes) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Data set → method → minutes of training, the least of the seeds, and NDCG@10 at each validation, their mean.

    Of a data set's models the one with most rows. Minutes are those of a whole GPU, or on a CPU of the clock, spread
    evenly over the epochs.
    """
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    shown = [one for one in of_most_rows(results) if one.config.get("validations")]
    for dataset in dict.fromkeys(one.dataset for one in results):
        here = [one for one in shown if one.dataset == dataset]
        for method in TRAINED:
            runs = [one for one in here if one.method == method]
            epochs = {tuple(epoch for epoch, _, _ in one.config["validations"]) for one in runs}
            spent = [minutes.get((one.run, TRAINING), one.config["train_seconds"] / 60) for one in runs]
            if len(epochs) != 1:
                continue
            [at] = epochs
            scores = [[score for _, _, score in one.config["validations"]] for one in runs]
            curve = [fmean(found) for found in zip(*scores, strict=True)]
            found.setdefault(dataset, {})[method] = [min(spent) * epoch / at[-1] for epoch in at], curve
    return found


def time_table(lines: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> str:
    """NDCG@10 on validation items after each quarter of the training."""
    rows = []
    for dataset, by in lines.items():
        for method, (minutes, scores) in by.items():
            near = [min(range(len(minutes)), key=lambda at: abs(minutes[at] - part * minutes[-1])) for part in QUARTERS]
            best = max(range(len(scores)), key=scores.__getitem__)
            figures = [f"{scores[at]:.4f}" for at in near]
            rows.append(
                [dataset, method, f"{minutes[-1]:.2f}", *figures, f"{scores[best]:.4f} after {minutes[best]:.2f}"]
            )
    heads = ["data set", "", "minutes", *(f"{part:.0%}" for part in QUARTERS), "best, after minutes"]
    return table(heads, rows, left=2) if rows else ""


def latency_table(results: Sequence[Result]) -> str:
    """Rows whose single requests were timed, the newest of each, fastest first: quality and latency of the same run."""
    timed = {(*one.group, one.config["latency"]["clients"]): one for one in results if "latency" in one.config}
    lines = []
    for one in sorted(timed.values(), key=lambda one: (one.dataset, one.model, one.config["latency"]["p50_ms"])):
        latency = one.config["latency"]
        each = 1000 * float(one.row["seconds"]) / int(one.row["targets"])
        figures = [mean([one.number(name)]) for name in ("hit@10", "ndcg@10")]
        times = [f"{latency['p50_ms']:.2f}", f"{latency['p99_ms']:.2f}", f"{each:.2f}"]
        where = one.row["beam_width"], str(latency["clients"])
        lines.append([one.dataset, one.method, where[0], *figures, where[1], *times, one.config.get("device", "")])
    heads = ["data set", "", "beam width", "Hit@10", "NDCG@10", "at a time", "p50 ms", "p99 ms", "all users, ms each"]
    return table([*heads, "on"], lines, left=2) if lines else ""


def search_table(results: Sequence[Result]) -> str:
    """Of validation items, one line a data set (with its tokenizer), change of options, method and beam width, best
    NDCG@10 first; means over seeds, of each the newest row.
    """
    groups: dict[tuple, list] = {}
    found = [one for one in results if one.model and one.row["split"] == "valid" and not one.measures_beside]
    for one in {(*one.group, one.row["beam_width"], one.seed): one for one in found}.values():
        groups.setdefault((*one.group, one.row["beam_width"]), []).append(one)
    lines = [
        [*key, str(len(group)), *(f"{fmean(one.number(name) for one in group):.4f}" for name in SEARCHED)]
        for key, group in groups.items()
    ]
    lines.sort(key=lambda line: (-float(line[-1]), line))
    heads = ["data set", "options", "", "K", "seeds", "Hit@5", "Hit@10", "NDCG@5", "NDCG@10"]
    return table(heads, lines, left=3) if lines else ""


def origin(rows: Sequence[Result]) -> str:
    """Seeds and commits of some rows."""
    seeds, commits = (
        list(dict.fromkeys(row)) for row in ([one.seed for one in rows], [one.row["commit"] for one in rows])
    )
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, commit {', '.join(commits)}"
