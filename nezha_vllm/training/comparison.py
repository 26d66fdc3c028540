"""NEZHA beside its baselines under one convention, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nezha_vllm.training.baselines import Markov, Popularity
from nezha_vllm.training.evaluation import Track, recommended_items
from nezha_vllm.training.metrics import CUTOFFS, ranks_of, summary

if TYPE_CHECKING:
    from rich.table import Table

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.data.dataset import Dataset
    from nezha_vllm.training.evaluation import NezhaModel


@dataclass(frozen=True)
class Comparison:
    """``rows``: method → ``hit@5`` …; the rest says how they were measured."""

    dataset: str
    split: str
    targets: int
    items: int
    exclude_history: bool
    max_history: int
    beam_width: int
    catalogue_version: str
    rows: dict[str, dict[str, float]]

    @property
    def convention(self) -> str:
        history = "left out" if self.exclude_history else "kept in the ranking"
        return (
            f"leave-one-out, {self.split}: {self.targets:,} users, all {self.items:,} items ranked, "
            f"those of the history {history}; "
            f"NEZHA: last {self.max_history} items, beam width {self.beam_width}"
        )


def compare(
    model: NezhaModel,
    catalogue: Catalogue,
    dataset: Dataset,
    *,
    part: str,
    max_history: int,
    beam_width: int | None = None,
    exclude_history: bool = False,
    prefix: Sequence[int] = (),
    track: Track = iter,
) -> Comparison:
    """Rank all items with every method; baselines count the training sequences, as the model did."""
    split, n = dataset.leave_one_out(), max(CUTOFFS)
    histories = split.history(part)
    targets = split.valid_target if part == "valid" else split.test_target
    width = beam_width or (model.config.max_beam_width if exclude_history else model.config.beam_width)
    # with exclusion the whole beam is asked for, since any of it may be history
    wanted = width if exclude_history else n
    ask: dict[str, Any] = {
        "n": wanted,
        "max_history": max_history,
        "beam_width": width,
        "prefix": prefix,
        "track": track,
    }
    lists: dict[str, list[list[str]]] = {"popularity": [], "Markov, first order": []}
    popularity, markov = Popularity(split.train, dataset.item_ids), Markov(split.train, dataset.item_ids)
    for history in histories:
        lists["popularity"].append(popularity.recommend(history))
        lists["Markov, first order"].append(markov.recommend(history))
    lists["NEZHA"] = recommended_items(model, catalogue, histories, **ask)
    if exclude_history:
        seen = [set(history) for history in histories]
        lists = {
            name: [[item for item in items if item not in gone] for items, gone in zip(ranked, seen, strict=True)]
            for name, ranked in lists.items()
        }
    rows = {name: summary(ranks_of(targets, ranked)) for name, ranked in lists.items()}
    return Comparison(
        dataset.name,
        part,
        len(targets),
        catalogue.num_items,
        exclude_history,
        max_history,
        width,
        catalogue.version,
        rows,
    )


def table(comparison: Comparison) -> Table:
    """For a terminal; the best value of a column is bold."""
    from rich.table import Table

    names = [f"{metric}@{k}" for k in CUTOFFS for metric in ("hit", "ndcg")]
    view = Table(title=comparison.dataset, caption=comparison.convention, caption_justify="left")
    view.add_column("")
    for name in names:
        view.add_column(name.replace("hit", "Hit").replace("ndcg", "NDCG"), justify="right")
    best = {name: max(row[name] for row in comparison.rows.values()) for name in names}
    for method, row in comparison.rows.items():
        cells = [f"[bold]{row[name]:.4f}[/bold]" if row[name] == best[name] else f"{row[name]:.4f}" for name in names]
        view.add_row(method, *cells)
    return view


def to_json(comparison: Comparison) -> str:
    return json.dumps(asdict(comparison) | {"convention": comparison.convention}, indent=2) + "\n"
