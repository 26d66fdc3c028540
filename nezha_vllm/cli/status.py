"""What a running server does: its model, its catalogue, and its requests since it started or over some seconds.

  nezha status
  nezha status http://10.0.0.5:8000 --over 10
  nezha status 127.0.0.1:8000 --json

It reads /metrics and /v1/models; docs/metrics.md says what each number means.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from nezha_vllm.scrape import Scrape

SUMMARY = "a running server -> its catalogue, requests and times"
MOST_SECONDS = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", nargs="?", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--over", type=float, metavar="SECONDS", help="wait, and show what happened meanwhile")
    parser.add_argument("--api-key", metavar="KEY", help="of the server; default: VLLM_API_KEY in the environment")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for each answer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import json
    import time

    from nezha_vllm.cli import UserError
    from nezha_vllm.scrape import base_url, metrics_of, models_of

    url, over, timeout = base_url(arguments.url), arguments.over, arguments.timeout
    if over is not None and not 0 < over <= MOST_SECONDS:
        raise UserError(f"--over is {over:g}, must be above 0 and at most {MOST_SECONDS:g} seconds")
    if not 0 < timeout <= MOST_SECONDS:
        raise UserError(f"--timeout is {timeout:g}, must be above 0 and at most {MOST_SECONDS:g} seconds")
    now = metrics_of(url, timeout)
    models = models_of(url, timeout, arguments.api_key or os.environ.get("VLLM_API_KEY"))
    counted = now
    if over is not None:
        time.sleep(over)
        now, earlier = metrics_of(url, timeout), now
        counted = now.since(earlier)
    found = facts(now, counted, time.time(), over)
    if arguments.json:
        print(json.dumps({"url": url, "models": models, **found}, indent=2))
    else:
        _show(url, models, found, over)
    return 0


def facts(now: Scrape, counted: Scrape, at: float, over: float | None) -> dict[str, Any]:
    """What there is to say, as JSON; None where nothing was counted.

    Args:
        now: the latest scrape.
        counted: counters of the time that the numbers are about.
        at: Unix time of the latest scrape.
        over: that time in seconds; None for all since the server started.
    """
    versions = {name: int(count) for name, count in now.by("nezha_catalogue_info", "version").items() if count > 0}
    published = now.total("nezha_catalogue_published_timestamp_seconds")
    outcomes = _whole(counted.by("nezha_requests_total", "outcome"))
    drafted, valid = counted.total("nezha_beams_drafted_total"), counted.total("nezha_beams_valid_total")
    return {
        "catalogue": {
            "versions": versions,
            "items": _number(now.total("nezha_catalogue_items")),
            "semantic_ids": _number(now.total("nezha_catalogue_semantic_ids")),
            "age_seconds": None if published is None else at - published,
        },
        "requests": {
            **outcomes,
            "per_second": None if over is None else sum(outcomes.values()) / over,
            "running": _number(now.total("vllm:num_requests_running")),
            "waiting": _number(now.total("vllm:num_requests_waiting")),
        },
        "answers": {
            "prompts": _number(counted.total("nezha_items_returned_count")),
            "items_each": counted.mean("nezha_items_returned"),
            "beam_width": counted.mean("nezha_beam_width"),
            "valid_beams": valid / drafted if drafted and valid is not None else None,
            "short": _whole(counted.by("nezha_short_answers_total", "reason")),
        },
        "seconds": {
            "request": _times(counted, "nezha_request_seconds"),
            # the smallest bucket of vLLM's histogram is 0.3 s: too coarse for more than a mean
            "queue": {"mean": counted.mean("vllm:request_queue_time_seconds")},
            "draft_stage": _times(counted, "nezha_draft_stage_seconds"),
        },
    }


def _times(counted: Scrape, metric: str) -> dict[str, float | None]:
    return {"mean": counted.mean(metric), "p50": counted.quantile(metric, 0.5), "p99": counted.quantile(metric, 0.99)}


def _whole(counts: dict[str, float]) -> dict[str, int]:
    return {name: round(count) for name, count in counts.items()}


def _number(value: float | None) -> int | None:
    return None if value is None else round(value)


def _show(url: str, models: list[str], found: dict[str, Any], over: float | None) -> None:
    from rich.console import Console

    console = Console()
    console.print(f"{url} serves {', '.join(models)}", soft_wrap=True, markup=False, highlight=False)
    console.print(_table(found, over))
    if len(found["catalogue"]["versions"]) > 1:
        console.print("API processes answer from different versions: a swap is under way, or one could not follow")


def _table(found: dict[str, Any], over: float | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    catalogue, requests, answers = found["catalogue"], found["requests"], found["answers"]
    outcomes = {name: requests[name] for name in requests if name not in ("per_second", "running", "waiting")}
    title = "since the server started" if over is None else f"in {over:g} s"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")

    def row(name: str, *values: str | None) -> None:
        table.add_row(name, Text(" · ".join(value for value in values if value) or "–"))  # Text: versions are no markup

    row("catalogue", " and ".join(catalogue["versions"]), _age(catalogue["age_seconds"]))
    row("items", _count(catalogue["items"]), _count(catalogue["semantic_ids"], " semantic IDs"))
    table.add_section()
    row("requests", *(f"{count:,} {outcome}" for outcome, count in outcomes.items() if count or outcome == "answered"))
    if over is not None:
        row("requests/s", f"{requests['per_second']:,.1f}")
    row("now", _count(requests["running"], " running"), _count(requests["waiting"], " waiting"))
    table.add_section()
    row("prompts", _count(answers["prompts"]))
    row("items each", _decimal(answers["items_each"]))
    row("short answers", *(f"{count:,} by {reason}" for reason, count in answers["short"].items() if count))
    row("beam width", _decimal(answers["beam_width"]))
    row("valid beams", None if answers["valid_beams"] is None else f"{answers['valid_beams']:.1%}")
    table.add_section()
    for name, times in found["seconds"].items():
        texts = [f"{label} {_milliseconds(value)}" for label, value in times.items() if value is not None]
        row(name.replace("_", " "), *texts)
    return table


def _count(value: int | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:,}{unit}"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _age(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"published {seconds / size:.0f} {unit} ago"
    return f"published {max(0.0, seconds):.0f} s ago"
