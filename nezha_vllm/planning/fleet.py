"""From one server's queueing model to a fleet: the most that each may get, how many that takes by the hour."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nezha_vllm.planning.calibration import Comparison, calibrate, fit_errors, percentiles
from nezha_vllm.planning.measurements import (
    Curve,
    PlanError,
    choose,
    larger_catalogue,
    milliseconds_a_token,
    read_curves,
)
from nezha_vllm.planning.simulation import ServerModel, open_loop

SIMULATED = 12_000  # requests of a try: 120 of them are slower than p99
STEPS = 7  # halvings of the interval between an idle server and the highest rate measured
IDLE = 0.02  # share of that rate at which a server is as good as idle


@dataclass(frozen=True)
class Wanted:
    """What the fleet is for.

    Args:
        rates: requests/s by hour, as many hours as the traffic has.
        prompt_tokens: lengths and their shares, which sum to 1.
        p99_ms: what 99 of 100 requests must not exceed, at every hour.
        burst: the busiest minute of an hour over its mean.
        spare: share of the fleet that may be missing at the busiest hour by failures or updates; one replica at least.
        gpu_price: of an hour of one GPU with its share of the host, in any currency.
        estimate: also where the load curve must be carried over to longer prompts.
    """

    rates: tuple[float, ...]
    prompt_tokens: Mapping[int, float]
    beam_width: int
    n: int
    items: int
    p99_ms: float
    model: str = "llama-1b"
    burst: float = 1.0
    spare: float = 0.05
    gpu_price: float | None = None
    estimate: bool = False


@dataclass(frozen=True)
class Plan:
    """``per_replica`` is the most requests/s of one server of one GPU, at which its p50 and p99 are as foretold.

    ``margin`` is how much the model was too low on a measured p99, and by how much the goal was lowered for it.
    """

    wanted: Wanted
    curve: Curve
    per_replica: float
    p50_ms: float
    p99_ms: float
    margin: float
    replicas: tuple[int, ...]
    spare: int
    assumptions: tuple[str, ...]

    @property
    def gpus(self) -> int:
        return max(self.replicas) + self.spare

    @property
    def gpu_hours_fixed(self) -> float:
        """A day of the whole fleet."""
        return 24.0 * self.gpus

    @property
    def gpu_hours_followed(self) -> float:
        """A day of a fleet that follows the hours, spare included."""
        return 24.0 * (sum(self.replicas) / len(self.replicas) + self.spare)


def make_plan(results: Path, wanted: Wanted) -> Plan:
    """Raises ``PlanError`` where nothing measured speaks for the plan."""
    _check(wanted)
    curve = choose(read_curves(results), wanted.model, wanted.beam_width, wanted.n)
    more, more_ms, assumptions = _adapt(results, wanted, curve)
    fitted = calibrate(curve)
    model = replace(fitted.production, request_ms=fitted.production.request_ms + more)
    hoped, *_ = capacity(model, curve, wanted.p99_ms, more_ms)
    margin = margin_of(fit_errors(curve, fitted), hoped)
    per_replica, p50, p99 = capacity(model, curve, wanted.p99_ms / margin, more_ms)
    replicas = tuple(max(1, math.ceil(rate * wanted.burst / per_replica)) for rate in wanted.rates)
    spare = max(1, math.ceil(wanted.spare * max(replicas)))
    return Plan(wanted, curve, per_replica, p50, p99, margin, replicas, spare, tuple(assumptions))


def margin_of(comparisons: Sequence[Comparison], rate: float) -> float:
    """How many times the model's p99 the measured one was, at worst; 1 where it never was more.

    Loads count up to the first that is over ``rate``.
    """
    loads = [found.load.arrivals_per_s for found in comparisons]
    over = min((arrivals for arrivals in loads if arrivals >= rate), default=math.inf)
    return max([1.0, *(found.load.p99 / found.p99 for found in comparisons if found.load.arrivals_per_s <= over)])


def capacity(
    model: ServerModel, curve: Curve, p99_ms: float, more_ms: np.ndarray | None = None
) -> tuple[float, float, float]:
    """The most requests/s with p99 within the goal, at most the highest measured; with its p50 and p99.

    Raises ``PlanError`` if an idle server does not reach the goal.
    """
    high = max(load.arrivals_per_s for load in curve.open if load.kept_up)

    def at(rate: float) -> tuple[float, float]:
        return percentiles(open_loop(model, rate, SIMULATED, seed=1, more_ms=more_ms))

    low = IDLE * high
    found = at(low)
    if found[1] > p99_ms:
        raise PlanError(f"p99 of a server that is nearly idle is {found[1]:.1f} ms, over the goal of {p99_ms:.1f} ms")
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = at(middle)
        if tried[1] <= p99_ms:
            low, found = middle, tried
        else:
            high = middle
    return low, *found


def read_traffic(path: Path) -> tuple[float, ...]:
    """Requests/s of a CSV file with the columns ``hour`` and ``requests_per_s``. Raises ``PlanError``."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rates = tuple(float(row["requests_per_s"]) for row in csv.DictReader(file))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: needs a column requests_per_s of numbers, one row an hour ({error!r})") from error
    if not rates:
        raise PlanError(f"{path} has no rows")
    return rates


def _check(wanted: Wanted) -> None:
    if not wanted.rates or min(wanted.rates) < 0 or not all(map(math.isfinite, wanted.rates)) or max(wanted.rates) == 0:
        raise PlanError(f"traffic is {wanted.rates}; it needs requests/s of at least one hour, none below 0")
    shares = wanted.prompt_tokens
    if not shares or min(shares) < 1 or min(shares.values()) <= 0 or not abs(sum(shares.values()) - 1) < 1e-6:
        raise PlanError(f"prompt lengths are {dict(shares)}; their shares must sum to 1")
    priced = [] if wanted.gpu_price is None else ["gpu_price"]
    for name in ("beam_width", "n", "items", "p99_ms", "burst", *priced):
        if not 0 < getattr(wanted, name) < math.inf:
            raise PlanError(f"{name} is {getattr(wanted, name)}, must be a number over 0")
    if not 0 <= wanted.spare < 1:
        raise PlanError(f"spare is {wanted.spare}, must be a share from 0 to below 1")


def _adapt(results: Path, wanted: Wanted, curve: Curve) -> tuple[float, np.ndarray | None, list[str]]:
    """What the wanted requests cost beyond those measured: ms of all, ms to draw from; and what is assumed."""
    cell, notes = curve.cell, []
    said = [
        (wanted.beam_width, cell.beam_width, "beam width"),
        (wanted.n, cell.n, "n"),
        (max(wanted.prompt_tokens), cell.prompt_tokens, "prompt tokens"),
    ]
    notes += [f"{name} {asked} counted as {measured}, which was measured" for asked, measured, name in said
              if asked < measured]  # fmt: skip
    catalogue = larger_catalogue(results, cell, wanted.beam_width, wanted.items)
    if not catalogue.measured and not wanted.estimate:
        raise PlanError(
            f"{wanted.items:,} items with beam width {wanted.beam_width}: at {catalogue.items:,} items, "
            f"{catalogue.width} is the widest beam measured. Measure with `python -m benchmarks.validity`, or let the "
            "draft stage grow as it does there with --estimate"
        )
    if wanted.items > cell.items:
        how = "as measured" if catalogue.measured else f"ESTIMATE: grown as at beam width {catalogue.width}"
        notes.append(
            f"{wanted.items:,} items: {1000 * catalogue.milliseconds:.1f} µs a request more than the load curve's "
            f"{cell.items:,} ({how}, at {catalogue.items:,} items)"
        )
    longest = max(wanted.prompt_tokens)
    if longest <= cell.prompt_tokens:
        return catalogue.milliseconds, None, notes
    slope = milliseconds_a_token(results, cell, longest)
    if not wanted.estimate:
        raise PlanError(
            f"prompts of {longest} tokens: the load curve has {cell.prompt_tokens}. Measure one with `python -m "
            f"benchmarks.throughput --prompts {longest} --rates auto`, or take {1000 * slope:.1f} µs a token more, "
            "from single requests, with --estimate"
        )
    notes.append(f"ESTIMATE: {1000 * slope:.1f} µs for each token over {cell.prompt_tokens}, as for single requests")
    lengths = np.array([max(0, length - cell.prompt_tokens) * slope for length in wanted.prompt_tokens])
    counts = np.round(1000 * np.array(list(wanted.prompt_tokens.values()))).astype(int)
    return catalogue.milliseconds, np.repeat(lengths, np.maximum(counts, 1)), notes
