"""A queueing model's times from a measured load curve, and how well it foretells the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nezha_vllm.planning.measurements import Curve, Load, PlanError
from nezha_vllm.planning.simulation import ServerModel, closed_loop, open_loop

API_MS = 0.67  # CPU time of a request that does not stream, n = 10 (docs/http-api.md, "Speed")
SEEDS = 3
TRIALS = 50
CLOSE = 0.85
WEIGHTS = (4.0, 1.0)  # a few seconds tell a p50 better than a p99


@dataclass(frozen=True)
class Calibration:
    """The same server under both kinds of load generator.

    ``closed`` is for requests as `wrk` sends them, ``open`` as `vllm bench serve` does, which streams every item.
    """

    closed: ServerModel
    open: ServerModel


@dataclass(frozen=True)
class Comparison:
    """A measured load beside the model's word on it; milliseconds."""

    load: Load
    p50: float
    p99: float

    @property
    def off(self) -> tuple[float, float]:
        """Relative errors of p50 and p99: 0.1 is 10 % too high."""
        return self.p50 / self.load.p50 - 1, self.p99 / self.load.p99 - 1


def calibrate(curve: Curve, without: Load | None = None) -> Calibration:
    """Fit the model to the curve, ``without`` one of its loads. Raises ``PlanError`` with too few rows."""
    closed = [load for load in curve.closed if load is not without]
    opened = [load for load in fitted_loads(curve) if load is not without]
    if len(closed) < 2 or len(opened) < 2:
        raise PlanError(f"{curve.cell}: needs two closed and two open loads, has {len(closed)} and {len(opened)}")
    # in a closed loop everybody is in one step, and latency is nearly a line over the number of clients
    request_ms, fixed_ms = np.polyfit([load.clients or 0 for load in closed], [load.p50 for load in closed], 1)
    step_ms, rest_ms = 0.6 * max(1.0, fixed_ms), 0.2 * max(1.0, fixed_ms)
    start = ServerModel(step_ms, float(request_ms), API_MS, rest_ms, curve.max_requests, curve.api_processes)
    # in a closed loop, a step's constant part and the rest cannot be told from the API processes' work
    of_closed = _fit(start, ("step_ms", "request_ms", "rest_ms"), closed)
    of_open = _fit(replace(of_closed, api_ms=2 * API_MS), ("step_ms", "request_ms", "api_ms"), opened)
    return Calibration(of_closed, of_open)


def fitted_loads(curve: Curve) -> list[Load]:
    """Open loads that are not close to the most the server can do: there, latency is the chance of a few seconds."""
    most = max(load.requests_per_s for load in curve.closed)
    return [load for load in curve.open if load.kept_up and (load.rate or 0) <= CLOSE * most]


def _fit(start: ServerModel, names: tuple[str, ...], loads: Sequence[Load]) -> ServerModel:
    """The model whose times ``names`` foretell p50 and p99 of the loads with the least weighted squared log errors."""
    from scipy.optimize import minimize

    def model(logs: np.ndarray) -> ServerModel:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def error(logs: np.ndarray) -> float:
        found = [_foretell(model(logs), load, seeds=1) for load in loads]
        return sum(
            weight * np.log1p(off) ** 2
            for comparison in found
            for weight, off in zip(WEIGHTS, comparison.off, strict=True)
        )

    guess = np.log([getattr(start, name) for name in names])
    simplex = np.vstack([guess, guess + 0.3 * np.eye(len(guess))])
    best = minimize(error, guess, method="Nelder-Mead", options={"maxfev": TRIALS, "initial_simplex": simplex})
    return model(best.x)


def compare(curve: Curve) -> list[Comparison]:
    """Every load that the server kept up with, foretold; an open one by a model fitted without it."""
    together = calibrate(curve)
    found = [_foretell(together.closed, load) for load in curve.closed]
    loads = fitted_loads(curve)
    for load in curve.open:
        if load.kept_up:
            apart = load in loads and len(loads) > 2
            found.append(_foretell(calibrate(curve, without=load).open if apart else together.open, load))
    return found


def fit_errors(curve: Curve, model: ServerModel) -> list[Comparison]:
    """The open loads beside the model that was fitted to them."""
    return [_foretell(model, load) for load in curve.open if load.kept_up]


def percentiles(latencies: Sequence[np.ndarray]) -> tuple[float, float]:
    p50, p99 = np.percentile(np.concatenate(latencies), (50, 99))
    return float(p50), float(p99)


def _foretell(model: ServerModel, load: Load, seeds: int = SEEDS) -> Comparison:
    """As long as it was measured, from an idle server on."""
    if load.clients:
        return Comparison(load, *percentiles([closed_loop(model, load.clients, 20 * load.clients)]))
    assert load.rate
    found = [open_loop(model, load.rate, load.requests, seed) for seed in range(seeds)]
    return Comparison(load, *percentiles(found))
