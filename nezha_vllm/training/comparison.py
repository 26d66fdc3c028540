"""NEZHA beside its baselines under one convention, as a table and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nezha_vllm.ablations import FREE_LABEL, LABELS
from nezha_vllm.config import AUTOREGRESSIVE
from nezha_vllm.training.baselines import Baseline, ItemKnn, Markov, Popularity
from nezha_vllm.training.evaluation import Track, Trained, device_name, ranked
from nezha_vllm.training.metrics import CUTOFFS, DEEP_CUTOFF, gains, hit, hits, percentiles, ranks_of, summary
from nezha_vllm.training.sasrec import SasRec, SasRecOptions
from nezha_vllm.training.served import Server, served_items
from nezha_vllm.training.significance import paired_bootstrap

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.data.dataset import Dataset, Split
    from nezha_vllm.training.evaluation import NezhaModel

WARM_UP = 5  # requests before those that are timed: kernels compile
# as the command line names them → as tables do
BASELINES = {
    "popularity": "popularity",
    "markov": "Markov, first order",
    "knn": "item kNN",
    "sasrec": "SASRec, full cross-entropy",
}


@dataclass(frozen=True)
class Comparison:
    """``rows``: method → ``hit@5`` …; the rest says how they were measured.

    A row has ``hit@500`` if so many items are ranked for every user, and if it has beams ``valid``, the share of the
    finished ones that are items. ``validities``: method → its validity mode, likewise.

    ``against``: baseline → metric → the model's figure minus the baseline's, as in ``significance.Difference``.
    ``seconds``: method → its training, if any is done here, and ranking. ``options``: method → its training options.
    ``latency``: of requests over HTTP, or answered one at a time, in milliseconds, with the ``clients`` at a time.
    ``ranks``: method → rank of each user's item, from 0. ``device``: what the model ran on.
    """

    dataset: str
    split: str
    targets: int
    items: int
    exclude_history: bool
    max_history: int
    beam_width: int
    catalogue_version: str
    rows: dict[str, dict[str, float]]
    model: str = LABELS["nezha"]
    validity: str = "stepwise"
    split_by: str = "leave-one-out"
    against: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    validities: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    device: str = ""

    @property
    def convention(self) -> str:
        history = "left out" if self.exclude_history else "kept in the ranking"
        return (
            f"{self.split_by}, {self.split}: {self.targets:,} users, all {self.items:,} items ranked, "
            f"those of the history {history}; "
            f"{self.model}: last {self.max_history} items, beam width {self.beam_width}"
            + (", validity checked at the end" if self.validity == "final" else "")
        )


def compare(
    model: NezhaModel,
    catalogue: Catalogue,
    dataset: Dataset,
    *,
    part: str,
    max_history: int,
    options: Mapping[str, Any] | None = None,
    beam_width: int | None = None,
    validity: str | None = None,
    exclude_history: bool = False,
    prefix: Sequence[int] = (),
    baselines: Sequence[str] = ("popularity", "markov"),
    others: Sequence[Trained] = (),
    server: Server | None = None,
    alone: int = 0,
    seed: int = 0,
    track: Track = iter,
    write: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Rank all items with every method; baselines learn from the training sequences, as the model did.

    Args:
        options: what the model was trained with, to be noted.
        baselines: keys of ``BASELINES``, in the order of the rows.
        others: further checkpoints, asked with the same beam width, each with its own history and validity. A language
            model has two rows, decoded freely and within the catalogue's prefixes.
        server: serves the model, and is asked the same as one more row.
        alone: so many users are then asked one at a time, and timed, by each decoding.
        seed: of SASRec and of the bootstrap.
        write: gets a line an epoch of SASRec.

    Raises:
        ValueError: a baseline that does not exist, or another checkpoint with other items.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"no baseline {', '.join(unknown)}; there are {', '.join(BASELINES)}")
    split = dataset.split()
    histories = split.history(part)
    targets = split.target(part)
    width = beam_width or (model.config.max_beam_width if exclude_history else model.config.beam_width)
    seen = [set(history) if exclude_history else set() for history in histories]
    # so deep that the largest cut-off is full when the history has gone
    longest = max(map(len, seen))
    depth = DEEP_CUTOFF + longest

    mode = validity or model.config.validity
    decodings = _decodings(model.config.method, validity, mode)
    name_of_model = decodings[-1][0]
    ranks, seconds, trained, modes, shares, latency = {}, {}, {}, {}, {}, {}

    def measure(name: str, rank: Callable[[], list[list[str]]]) -> None:
        start = time.perf_counter()
        found = rank()
        seconds[name] = round(time.perf_counter() - start, 3)
        kept = [[item for item in items if item not in gone] for items, gone in zip(found, seen, strict=True)]
        ranks[name] = ranks_of(targets, kept)

    def measure_beams(name: str, asked: Trained, mode: str) -> None:
        ask = {"max_history": asked.max_history, "prefix": asked.prefix, "validity": mode, **common}

        def rank() -> list[list[str]]:
            found = ranked(asked.model, asked.catalogue, histories, **ask)
            shares[name] = found.valid_share
            return found.items

        trained[name], modes[name] = dict(asked.options), mode
        measure(name, rank)
        if alone:
            first = [*histories[:WARM_UP], *histories[:alone]]
            found = ranked(asked.model, asked.catalogue, first, **(ask | {"track": iter, "batch_size": 1}))
            latency[name] = percentiles(found.milliseconds[len(histories[:WARM_UP]) :]) | {"clients": 1}

    def baseline(name: str) -> list[list[str]]:
        if name == "sasrec":
            trained[BASELINES[name]] = asdict(SasRecOptions(seed=seed))
        return _baseline(name, split, dataset, seed, write).recommend_all(histories, depth)

    for name in baselines:
        measure(BASELINES[name], partial(baseline, name))
    # with exclusion the whole beam is asked for, since any of it may be history
    common: dict[str, Any] = {
        "n": width if exclude_history else min(width, DEEP_CUTOFF),
        "beam_width": width,
        "track": track,
    }
    for other in others:
        if set(other.catalogue.items["item_id"].to_pylist()) != set(catalogue.items["item_id"].to_pylist()):
            raise ValueError(f"{other.name} ranks other items than the first checkpoint, so no pair can be made")
        for label, other_mode in _decodings(other.model.config.method, None, other.model.config.validity):
            taken = label in ranks or label in dict(decodings)
            measure_beams(f"{label}: {other.name}" if taken else label, other, other_mode)
    if server is not None:
        over_http = f"{name_of_model} over HTTP"
        ask_server = {"max_history": max_history, "validity": mode, "catalogue_version": catalogue.version, **common}

        def ask_all() -> list[list[str]]:
            found = served_items(server, histories, **ask_server)
            latency[over_http] = percentiles(found.milliseconds) | {"clients": server.clients}
            return found.items

        trained[over_http], modes[over_http] = dict(options or {}), mode
        measure(over_http, ask_all)
    own = Trained("", model, catalogue, max_history, prefix, options or {})
    for label, own_mode in decodings:
        measure_beams(label, own, own_mode)

    def figures(name: str) -> dict[str, float]:
        deep = name not in modes or width - longest >= DEEP_CUTOFF
        more = {f"hit@{DEEP_CUTOFF}": hit(ranks[name], DEEP_CUTOFF)} if deep else {}
        return summary(ranks[name]) | more | ({"valid": shares[name]} if name in shares else {})

    return Comparison(
        dataset.name,
        part,
        len(targets),
        catalogue.num_items,
        exclude_history,
        max_history,
        width,
        catalogue.version,
        {name: figures(name) for name in ranks},
        name_of_model,
        decodings[-1][1],
        "leave-one-out" if dataset.cuts is None else "split by time",
        {name: _against(ranks[name_of_model], found, seed) for name, found in ranks.items() if name != name_of_model},
        modes,
        seconds,
        trained,
        latency,
        ranks,
        device_name(model.device),
    )


def _decodings(method: str, validity: str | None, default: str) -> list[tuple[str, str]]:
    """Label and validity mode of each row of a checkpoint, its main one last."""
    if method != AUTOREGRESSIVE:
        return [(LABELS[method], validity or default)]
    both = [(FREE_LABEL, "final"), (LABELS[method], "stepwise")]
    return [row for row in both if validity in (None, row[1])]


def _baseline(name: str, split: Split, dataset: Dataset, seed: int, write: Callable[[str], None]) -> Baseline:
    if name == "sasrec":
        held_out = split.valid_history, split.valid_target
        return SasRec(split.train, dataset.item_ids, *held_out, SasRecOptions(seed=seed), write=write)
    kinds: dict[str, Any] = {"popularity": Popularity, "markov": Markov, "knn": ItemKnn}
    return kinds[name](split.train, dataset.item_ids)


def _against(ours: np.ndarray, theirs: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    return {
        f"{metric}@{k}": paired_bootstrap(per_user(ours, k), per_user(theirs, k), seed=seed)._asdict()
        for metric, per_user in (("hit", hits), ("ndcg", gains))
        for k in CUTOFFS
    }


def table(comparison: Comparison) -> Table:
    """For a terminal; the best value of a column is bold."""
    from rich.table import Table

    names = [f"{metric}@{k}" for k in CUTOFFS for metric in ("hit", "ndcg")]
    names += [name for name in (f"hit@{DEEP_CUTOFF}", "valid") if any(name in row for row in comparison.rows.values())]
    view = Table(title=comparison.dataset, caption=comparison.convention, caption_justify="left")
    view.add_column("")
    for name in names:
        heading = name.replace("hit", "Hit").replace("ndcg", "NDCG").replace("valid", "valid beams")
        view.add_column(heading, justify="right")
    best = {name: max(row.get(name, 0) for row in comparison.rows.values()) for name in names if name != "valid"}
    for method, row in comparison.rows.items():
        view.add_row(method, *(_cell(row.get(name), best.get(name)) for name in names))
    return view


def _cell(figure: float | None, best: float | None) -> str:
    if figure is None:
        return "–"
    return f"[bold]{figure:.4f}[/bold]" if figure == best else f"{figure:.4f}"


def differences(comparison: Comparison) -> Table:
    """For a terminal: how far the model is above each baseline, with 95 % intervals over users."""
    from rich.table import Table

    view = Table(title=f"{comparison.model} minus …", caption="95 % interval and p of a paired bootstrap over users")
    view.add_column("")
    for metric in ("Hit@10", "NDCG@10"):
        view.add_column(metric, justify="right")
        view.add_column("p", justify="right")
    for method, found in comparison.against.items():
        cells = []
        for metric in ("hit@10", "ndcg@10"):
            gap = found[metric]
            cells += [f"{gap['mean']:+.4f} ({gap['low']:+.4f} … {gap['high']:+.4f})", f"{gap['p']:.4f}"]
        view.add_row(method, *cells)
    return view


def to_json(comparison: Comparison) -> str:
    shown = {name: value for name, value in asdict(comparison).items() if name != "ranks"}
    return json.dumps(shown | {"convention": comparison.convention}, indent=2) + "\n"
