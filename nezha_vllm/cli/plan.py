"""Replicas, GPUs and cost for a traffic, from measured rows and a queueing simulation.

  nezha plan --requests-per-s 5000 --beam-width 512 --p99 30
  nezha plan --traffic day.csv --beam-width 512 --items 100000000 --p99 30 --gpu-price 2.5
  nezha plan --check

One server of one GPU is simulated: API processes in front of an engine that answers in steps what waits. Its times are
fitted to the load curves in --results. --check prints the simulation beside every measured load. What was not measured
(longer prompts, wider beams, larger catalogues, other models) is refused, with the command that measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from nezha_vllm.planning.calibration import Calibration
    from nezha_vllm.planning.fleet import Plan, Wanted
    from nezha_vllm.planning.measurements import Curve

SUMMARY = "traffic and a latency goal -> replicas, GPUs, cost"
GOOD = 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traffic = parser.add_mutually_exclusive_group(required=True)
    traffic.add_argument("--traffic", type=Path, metavar="CSV", help="columns hour, requests_per_s: one row an hour")
    traffic.add_argument("--requests-per-s", type=float, metavar="X", help="the same at every hour")
    traffic.add_argument("--check", action="store_true", help="the simulation beside the measured loads, and no plan")
    parser.add_argument("--markdown", action="store_true", help="with --check: tables for a document")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="measured rows (%(default)s)")
    parser.add_argument("--model", help="as the rows name it (llama-1b; with --check all)")
    parser.add_argument(
        "--prompt-tokens", nargs="+", default=["128"], metavar="T", help="lengths, with shares: 128:0.8 512:0.2"
    )
    parser.add_argument("--beam-width", type=int, default=512, metavar="K", help="(%(default)s)")
    parser.add_argument("--n", type=int, default=10, help="items of an answer (%(default)s)")
    parser.add_argument("--items", type=int, default=50_000, help="of the catalogue (%(default)s)")
    parser.add_argument("--p99", type=float, default=30.0, metavar="MS", help="latency goal (%(default)s)")
    parser.add_argument(
        "--burst", type=float, default=1.0, help="busiest minute of an hour over its mean (%(default)s)"
    )
    parser.add_argument("--spare", type=float, default=0.05, help="share of replicas that may be missing (%(default)s)")
    parser.add_argument("--gpu-price", type=float, metavar="X", help="of a GPU's hour; no cost without it")
    parser.add_argument("--estimate", action="store_true", help="longer prompts than the load curve's, from latencies")


def run(arguments: argparse.Namespace) -> int:
    try:
        import scipy  # noqa: F401
        import simpy  # noqa: F401
    except ImportError:
        from nezha_vllm.cli import UserError

        raise UserError("simulation needs simpy and scipy; pip install 'nezha-vllm[plan]'") from None
    from rich.console import Console

    from nezha_vllm.planning.fleet import make_plan

    if arguments.check:
        _check(arguments.results, arguments.model, arguments.markdown, Console())
        return 0
    _print(make_plan(arguments.results, _wanted(arguments)), Console())
    return 0


def _wanted(arguments: argparse.Namespace) -> Wanted:
    from nezha_vllm.cli import UserError
    from nezha_vllm.planning.fleet import Wanted, read_traffic

    lengths: dict[int, float] = {}
    for text in arguments.prompt_tokens:
        length, _, share = text.partition(":")
        try:
            lengths[int(length)] = float(share) if share else 1 / len(arguments.prompt_tokens)
        except ValueError:
            raise UserError(f"--prompt-tokens {text}: write a length, or length:share") from None
    rates = read_traffic(arguments.traffic) if arguments.traffic else (arguments.requests_per_s,)
    return Wanted(
        rates,
        lengths,
        arguments.beam_width,
        arguments.n,
        arguments.items,
        arguments.p99,
        arguments.model or "llama-1b",
        arguments.burst,
        arguments.spare,
        arguments.gpu_price,
        arguments.estimate,
    )


def _print(plan: Plan, console: Console) -> None:
    from rich.table import Table

    wanted, cell = plan.wanted, plan.curve.cell
    print(
        f"One server: {cell.model} on one {cell.gpu}, {plan.curve.api_processes} API processes.\n"
        f"It may get {plan.per_replica:,.0f} requests/s: p50 {plan.p50_ms:.1f} ms, p99 {plan.p99_ms:.1f} ms by the "
        f"simulation; goal {wanted.p99_ms:g} ms.\n"
    )
    if len(wanted.rates) > 1:
        table = Table("hour", "requests/s", "replicas", "load of each")
        for hour, (rate, replicas) in enumerate(zip(wanted.rates, plan.replicas, strict=True)):
            table.add_row(str(hour), f"{rate:,.0f}", f"{replicas:,}", f"{rate / replicas / plan.per_replica:.0%}")
        console.print(table)
    print(f"GPUs: {plan.gpus:,}, of them {plan.spare:,} spare")
    print(f"GPU-hours a day: {plan.gpu_hours_fixed:,.0f}; {plan.gpu_hours_followed:,.0f} if replicas follow the hours")
    if wanted.gpu_price:
        fixed, followed = (wanted.gpu_price * hours for hours in (plan.gpu_hours_fixed, plan.gpu_hours_followed))
        requests = 3600 * sum(wanted.rates) * 24 / len(wanted.rates)
        print(f"Cost a day at {wanted.gpu_price:g} a GPU-hour: {fixed:,.0f}; {followed:,.0f} if they follow the hours")
        print(f"Cost of a million requests: {1e6 * fixed / requests:.2f}; {1e6 * followed / requests:.2f}")
    print("\nAssumed:")
    for assumption in (
        f"rows of {plan.curve.commit}: prompts without a prefix-cache hit, {plan.curve.settings}",
        f"up to that load, measured p99 was at most {plan.margin:.2f} times the simulated: the goal is divided by that",
        "arrivals are Poisson, and a balancer sends each to a replica at random; a better one only helps",
        f"within an hour, the busiest minute is {wanted.burst:g} times the mean",
        "a replica is as fast beside others of its host as alone",
        *plan.assumptions,
    ):
        print(f"* {assumption}")


def _check(results: Path, model: str | None, markdown: bool, console: Console) -> None:
    from nezha_vllm.planning.calibration import calibrate
    from nezha_vllm.planning.measurements import PlanError, newest, read_curves

    skipped = []
    curves = newest(read_curves(results))
    chosen = [curve for curve in curves if model in (None, curve.cell.model)]
    if not chosen:
        known = "; ".join(sorted({curve.cell.model for curve in curves}))
        raise PlanError(f"no load curve of {model!r} in {results}, which has those of {known or 'none'}")
    for curve in chosen:
        cell = curve.cell
        title = f"{cell.model}, {cell.prompt_tokens} tokens, K = {cell.beam_width}, n = {cell.n}, {curve.commit}"
        try:
            fitted = calibrate(curve)
        except PlanError:
            skipped.append(title)
            continue
        _print_table(title, _compared(curve, fitted), markdown, console)
        for kind, times in (("", fitted.plain), ("~ ", fitted.streamed)):
            if times is not None:
                print(
                    f"{kind}a step {times.step_ms:.2f} ms and {times.request_ms:.2f} a request, API process "
                    f"{times.api_ms:.2f} a request and {times.pause_ms:.0f} a second, rest {times.rest_ms:.2f}"
                )
        print()
    for title in skipped:
        print(f"{title}: not checked, that takes one engine, two closed and two open loads")
    print(
        f"\n✗: more than {GOOD:.0%} off. In brackets: where that is in nine of ten runs as long as the measured one. "
        "~: every item streamed. Left out: p50 and p99 off by a fit without that load. Open loads over 85 % of the "
        "closed loops' most requests/s, which have nothing there, are not fitted: their queue does not settle within "
        "a measurement. Of older rows of the same kind of request nothing is said."
    )


def _compared(curve: Curve, fitted: Calibration) -> Iterator[list[str]]:
    from nezha_vllm.planning.calibration import compare

    for found, apart in compare(curve, fitted):
        load = found.load
        cells = [f"{load.clients} clients" if load.clients else f"{load.arrivals_per_s:,.0f}/s" + " ~" * load.streamed]
        for measured, simulated, off, chance in zip(
            (load.p50, load.p99), (found.p50, found.p99), found.off, found.off_ranges, strict=True
        ):
            cells += [f"{measured:.1f}", f"{simulated:.1f}", _off(off, chance)]
        yield [*cells, "" if apart is None else ", ".join(map(_off, apart.off))]


def _print_table(title: str, rows: Iterable[list[str]], markdown: bool, console: Console) -> None:
    from rich.table import Table

    heads = ("load", "p50", "sim.", "off %", "p99", "sim.", "off %", "left out")
    if markdown:
        print(f"{title}; ms\n")
        for cells in (heads, ["---"] * len(heads), *rows):
            print("| " + " | ".join(cells) + " |")
        print()
        return
    table = Table(*heads, title=f"{title}; ms", padding=(0, 0))
    for column in table.columns:
        column.no_wrap = True
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def _off(off: float, chance: tuple[float, float] | None = None) -> str:
    within = "" if chance is None else f" ({round(100 * chance[0]):+}…{round(100 * chance[1]):+})"
    return f"{round(100 * off):+}{within}" + (" ✗" if abs(off) > GOOD else "")
