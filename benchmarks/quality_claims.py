"""What the quality rows say about the claims: nothing lost against beam search, published figures, other backbones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.quality_gaps import METRICS, Gap
from benchmarks.quality_rows import NO_SCORES, NO_TOKENS, OURS, SHORT_HISTORIES, UNVERIFIED, Result, mean
from nezha_vllm.ablations import FREE_LABEL, LABELS
from nezha_vllm.training.significance import Difference

BEAM_SEARCHES = {FREE_LABEL: "beam search", LABELS["ar"]: "constrained beam search"}
VARIANTS = SHORT_HISTORIES, NO_SCORES, NO_TOKENS
BEAM_SEARCHES |= {f"{label}{kind}": f"{name}{kind}" for kind in VARIANTS for label, name in BEAM_SEARCHES.items()}
RIVALS = BEAM_SEARCHES | {f"{OURS}{kind}": f"{OURS}{kind}" for kind in VARIANTS} | {LABELS["mtp"]: "MTP"}
RIVALS |= {LABELS[f"nezha-{n}"]: f"NEZHA-{n}" for n in (1, 2, 3)} | {UNVERIFIED: "NEZHA-4"}
# Hit@10 and NDCG@10 on the 5-core of 22,363 users, leave-one-out, full ranking
PUBLISHED = {
    "beauty-file-order": {
        "TIGER": (0.0648, 0.0384),
        "LETTER-TIGER": (0.0672, 0.0364),
        "ActionPiece": (0.0775, 0.0424),
        "LC-Rec": (0.0788, 0.0420),
        "RPG": (0.0809, 0.0464),
    },
    "beauty-ties-shuffled": {
        "TIGER, run again": (0.0651, 0.0346),
        "SASRec, full cross-entropy": (0.0859, 0.0503),
    },
}
SAME_ORDER = {"beauty-letter": "beauty-file-order"}


def interval(gap: Difference) -> str:
    return f"{gap.mean:+.4f} ({gap.low:+.4f} … {gap.high:+.4f}), p {gap.p:.4f}"


def verdict(gap: Difference) -> str:
    """``above`` or ``below`` where the interval does not hold zero, else ``level``."""
    return "above" if gap.low > 0 else "below" if gap.high < 0 else "level"


def sacrifice_tables(gaps: Sequence[Gap]) -> str:
    """First the differences to beam search, then in how many of the four metrics NEZHA is above, level and below."""
    found = [gap for gap in gaps if gap.method in RIVALS]
    if not found:
        return ""
    beams = [
        [
            gap.dataset,
            gap.model,
            str(gap.seeds),
            BEAM_SEARCHES[gap.method],
            *(interval(gap.by[name]) for name in METRICS),
        ]
        for gap in sorted(found, key=lambda gap: (gap.dataset, gap.model, list(RIVALS).index(gap.method)))
        if gap.method in BEAM_SEARCHES
    ]
    rivals = [name for name in RIVALS if any(gap.method == name for gap in found)]
    counts = []
    for dataset, model in sorted({(gap.dataset, gap.model) for gap in found}):
        cells = {gap.method: gap for gap in found if (gap.dataset, gap.model) == (dataset, model)}
        said = [_counted(cells[name]) if name in cells else "–" for name in rivals]
        counts.append([dataset, model, *said])
    heads = ["data set", "backbone", "seeds", f"{OURS} minus …", *METRICS]
    first = table(heads, beams, left=4)
    second = table(["data set", "backbone", *(RIVALS[name] for name in rivals)], counts, left=2 + len(rivals))
    return f"{first}\n\n{second}"


def _counted(gap: Gap) -> str:
    verdicts = [verdict(difference) for difference in gap.by.values()]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in ("above", "level", "below") if word in verdicts)


def published_table(results: Sequence[Result]) -> str:
    """NEZHA of each model among published figures of the same users, items, split and order of ties, best first."""
    lines = []
    for dataset in dict.fromkeys(one.dataset for one in results):
        known = PUBLISHED.get(SAME_ORDER.get(dataset, dataset), {})
        ours = [one for one in results if one.dataset == dataset and one.method == OURS]
        rows = [(name, "published", *figures) for name, figures in known.items()]
        for model in dict.fromkeys(one.model for one in ours):
            group = [one for one in ours if one.model == model]
            figures = (fmean(one.number(name) for one in group) for name in ("hit@10", "ndcg@10"))
            rows.append((f"**{OURS}**, {model}", str(len(group)), *figures))
        rows.sort(key=lambda row: -row[2])
        if known and ours:
            lines += [[dataset, name, seeds, f"{hit:.4f}", f"{gain:.4f}"] for name, seeds, hit, gain in rows]
    return table(["data set", "", "seeds", "Hit@10", "NDCG@10"], lines, left=2) if lines else ""


def backbones_table(results: Sequence[Result]) -> str:
    """Where a data set has several backbones: NEZHA, beam search and MTP heads of each, of the seeds that all have.

    Models with teachers are not among them: what they differ in is not the backbone.
    """
    methods = {OURS: OURS, LABELS["ar"]: "beam search", LABELS["mtp"]: "MTP"}
    lines = []
    for dataset in dict.fromkeys(one.dataset for one in results):
        here = [one for one in results if one.dataset == dataset and one.method in methods]
        here = [one for one in here if not one.config.get("teachers")]
        ours = [one for one in here if one.method == OURS]
        models = list(dict.fromkeys(one.model for one in ours))
        seeds = {one.seed for one in ours}.intersection(
            *({one.seed for one in ours if one.model == name} for name in models)
        )
        for model in models if len(models) > 1 and seeds else ():
            chosen = [one for one in here if one.model == model and one.seed in seeds]
            parameters = next(one.config["parameters"] for one in chosen if one.method == OURS)
            figures = [
                mean([one.number(metric) for one in chosen if one.method == method])
                for metric in ("hit@10", "ndcg@10")
                for method in methods
            ]
            lines.append([dataset, model, f"{parameters:,}", str(len(seeds)), *figures])
    heads = [f"{metric}, {method}" for metric in ("Hit@10", "NDCG@10") for method in methods.values()]
    return table(["data set", "backbone", "parameters", "seeds", *heads], lines, left=2) if lines else ""
