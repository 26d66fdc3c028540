"""A queueing model's times from measured load curves, and how well it foretells the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nezha_vllm.planning.measurements import Curve, Load, PlanError
from nezha_vllm.planning.simulation import ServerModel, closed_loop, open_loop

API_MS = 0.67  # CPU time of a request that does not stream, n = 10 (docs/http-api.md, "Speed")
PAUSE_MS = 15.0  # where a fit begins
RUNS = 12  # of a load that is foretold, each as long as the measurement; their spread is what one run's chance is
TRIALS, NEAR_TRIALS = 25, 10  # of a fit, for each time that is free; of one that begins near its end
TENTH = 0.1  # relative errors that are larger count less than their square
CLOSE = 0.85
FITTED = 6000  # most requests of an open load that a fit simulates, of a closed one, whose queue settles at once, a
CLOSED_SHARE = 3  # third; what is foretold is as long as the measurement
WEIGHTS = (4.0, 1.0)  # a few seconds tell a p50 better than a p99


@dataclass(frozen=True)
class Calibration:
    """The same server under requests for a plain answer, and under requests that stream every item."""

    plain: ServerModel
    streamed: ServerModel | None

    def of(self, load: Load) -> ServerModel:
        found = self.streamed if load.streamed else self.plain
        assert found is not None, "it was fitted to all kinds of loads that there are"
        return found

    @property
    def production(self) -> ServerModel:
        """For a plan: plain answers, where their arrivals by chance were measured."""
        return self.streamed or self.plain


@dataclass(frozen=True)
class Comparison:
    """A measured load beside the model's word on it: medians of many runs, and where nine of ten runs are; ms."""

    load: Load
    p50: float
    p99: float
    p50_range: tuple[float, float]
    p99_range: tuple[float, float]

    @property
    def off(self) -> tuple[float, float]:
        """Relative errors of p50 and p99: 0.1 is 10 % too high."""
        return self.p50 / self.load.p50 - 1, self.p99 / self.load.p99 - 1

    @property
    def off_ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where chance alone leaves those errors, in nine of ten runs as long as the measured one."""
        (low, high), (low99, high99) = self.p50_range, self.p99_range
        p50, p99 = self.load.p50, self.load.p99
        return (low / p50 - 1, high / p50 - 1), (low99 / p99 - 1, high99 / p99 - 1)


def calibrate(curve: Curve, without: Load | None = None, begin: Calibration | None = None) -> Calibration:
    """Fit a server's times to its load curve, ``without`` one of the loads.

    Closed loops and plain open loops have all times in common. Of a closed loop alone, the API processes' work cannot
    be told from the rest, and is taken as known. Streamed loads have steps and API work of their own: engine and API
    processes then share the host with clients that read every item.

    Args:
        begin: times that are near already.

    Raises:
        PlanError: too few rows.
    """
    used = [load for load in fitted_loads(curve) if load is not without]
    closed, opened = [load for load in used if load.clients], [load for load in used if load.rate]
    if len(closed) < 2 or len(opened) < 2 or not curve.usable:
        raise PlanError(
            f"{curve.cell}: needs one engine, two closed and two open loads below {CLOSE:.0%} of its most "
            f"requests/s, has {len(closed)} and {len(opened)}"
        )
    streamed = [load for load in opened if load.streamed]
    plain = [load for load in opened if not load.streamed]
    free = ("step_ms", "request_ms", "rest_ms", *(("api_ms", "pause_ms") if plain else ()))
    found = _fit(begin.plain if begin else _first_guess(curve, bool(plain)), free, [*closed, *plain], begin is not None)
    if not streamed or plain:
        return Calibration(found, None)
    start = begin.streamed if begin and begin.streamed else replace(found, api_ms=2 * API_MS, pause_ms=PAUSE_MS)
    return Calibration(found, _fit(start, ("step_ms", "request_ms", "api_ms", "pause_ms"), streamed, begin is not None))


def _fit(start: ServerModel, names: Sequence[str], loads: Sequence[Load], near: bool) -> ServerModel:
    """The model whose times ``names`` foretell p50 and p99 of the loads with the least squared log errors.

    Errors over a tenth count less than that: a row that something disturbed is not to pull the others along.
    """
    from scipy.optimize import minimize

    def model(logs: np.ndarray) -> ServerModel:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def error(logs: np.ndarray) -> float:
        tried = model(logs)  # with the same random numbers as all others
        found = [_percentiles_of(tried, load, 0, most) for load, most in zip(loads, limits, strict=True)]
        off = np.log(found) - measured
        return float((np.array(WEIGHTS) * (np.sqrt(1 + (off / TENTH) ** 2) - 1)).sum())

    measured = np.log([(load.p50, load.p99) for load in loads])
    limits = [FITTED // CLOSED_SHARE if load.clients else FITTED for load in loads]
    guess = np.log([getattr(start, name) for name in names])
    simplex = np.vstack([guess, guess + (0.1 if near else 0.3) * np.eye(len(guess))])
    trials = (NEAR_TRIALS if near else TRIALS) * len(names)
    best = minimize(error, guess, method="Nelder-Mead", options={"maxfev": trials, "initial_simplex": simplex})
    return model(best.x)


def _first_guess(curve: Curve, plain: bool) -> ServerModel:
    """In a closed loop nearly everybody is in one step, and latency nearly a line over the number of clients."""
    clients, latencies = zip(*((load.clients or 0, load.p50) for load in curve.closed), strict=True)
    line = np.polyfit(clients, latencies, 1)
    request_ms, fixed_ms = max(0.05, float(line[0])), max(1.0, float(line[1]))
    limits = curve.max_requests, curve.api_processes, curve.overlapping
    return ServerModel(0.6 * fixed_ms, request_ms, API_MS, 0.2 * fixed_ms, PAUSE_MS if plain else 0.0, *limits)


def fitted_loads(curve: Curve) -> list[Load]:
    """But for open loads close to the most the server can do: there, latency is the chance of a few seconds."""
    most = max((load.requests_per_s for load in curve.closed), default=0.0)
    opened = [load for load in curve.open if load.kept_up and load.arrivals_per_s <= CLOSE * most]
    return [*curve.closed, *opened]


def compare(curve: Curve, fitted: Calibration) -> list[tuple[Comparison, Comparison | None]]:
    """Every load the server kept up with, foretold; and once more by a fit without it, if it is open and fitted."""
    found: list[tuple[Comparison, Comparison | None]] = []
    used = [load for load in fitted_loads(curve) if load.rate]
    for load in kept_up(curve, fitted):
        apart = None
        if load in used and len(used) > 2:
            apart = foretell(calibrate(curve, load, fitted).of(load), load)
        found.append((foretell(fitted.of(load), load), apart))
    return found


def kept_up(curve: Curve, fitted: Calibration) -> list[Load]:
    """All loads but those that were too high; streamed ones too, unless plain ones stand for them."""
    return [load for load in [*curve.closed, *curve.open] if load.kept_up and (fitted.streamed or not load.streamed)]


def fit_errors(curve: Curve, fitted: Calibration) -> list[Comparison]:
    """The open loads beside the model that was fitted to them."""
    return [foretell(fitted.of(load), load) for load in kept_up(curve, fitted) if load.rate]


def foretell(model: ServerModel, load: Load) -> Comparison:
    runs = np.array([_percentiles_of(model, load, seed, load.requests) for seed in range(1, 1 + RUNS)])
    p50, p99 = np.median(runs, axis=0).tolist()
    (low, low99), (high, high99) = np.percentile(runs, (5, 95), axis=0).tolist()
    return Comparison(load, p50, p99, (low, high), (low99, high99))


def percentiles(latencies: np.ndarray) -> tuple[float, float]:
    p50, p99 = np.percentile(latencies, (50, 99))
    return float(p50), float(p99)


def _percentiles_of(model: ServerModel, load: Load, seed: int, most: int) -> tuple[float, float]:
    """As long as it was measured, from an idle server on, but no more requests than ``most``."""
    requests = min(load.requests, most)
    users = load.clients or load.users
    if users:
        return percentiles(closed_loop(model, users, requests, seed, load.pause_ms))
    assert load.rate
    return percentiles(open_loop(model, load.rate, requests, seed))
