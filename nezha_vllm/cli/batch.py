"""Recommendations for every row of Parquet files, into a folder of Parquet files.

  nezha batch my-model histories.parquet --out recommendations --n 50
  nezha batch my-model histories/ --out recommendations --options '{"exclude_history": true, "beam_width": 100}'
  nezha batch my-model histories/ --out recommendations --ray auto --workers 8

The input has a column of histories, lists of item IDs, oldest first. Columns named n, beam_width, validity,
exclude_items, allow_items, exclude_history, segments, exclude_segments, min_score and max_per_id are options of their
row, as in the HTTP API. All others are copied to the output, which adds item_ids, scores, semantic_ids,
catalogue_version, reason and error. A row that the API would refuse has the reason in error and does not stop the job.

Stopped or killed, the same command goes on where it was: no row is lost or comes out twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

SUMMARY = "Parquet histories -> Parquet recommendations, on this machine or a Ray cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder made by `nezha train` or `nezha init`")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="Parquet files, or folders of them")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--history", default="history", metavar="COLUMN", help="lists of item IDs (%(default)s)")
    source.add_argument("--prompt", metavar="COLUMN", help="texts as the API's prompt, instead of histories")
    parser.add_argument("--n", type=int, default=10, help="items for each row (%(default)s)")
    parser.add_argument("--options", metavar="JSON", help="what vllm_xargs takes, for rows that do not set it")
    parser.add_argument("--last", type=int, metavar="N", help="use only the N latest items of each history")
    parser.add_argument("--rows-per-part", type=int, default=10_000, metavar="N", help="rows of a file (%(default)s)")
    parser.add_argument("--engine", metavar="JSON", help='arguments of vllm.LLM, such as {"dtype": "float32"}')
    ray = parser.add_argument_group("on a Ray cluster, whose nodes see the same paths")
    ray.add_argument("--ray", metavar="ADDRESS", help="auto for the cluster of this machine, local for a new one")
    ray.add_argument("--workers", type=int, default=1, metavar="N", help="at most so many engines (%(default)s)")
    ray.add_argument("--gpus", type=float, metavar="N", help="GPUs of each; default 1, without a GPU here 0")
    ray.add_argument("--cpus", type=float, default=1, metavar="N", help="CPU cores of each (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    import os

    from rich.console import Console

    from nezha_vllm.batch.job import score_parquet
    from nezha_vllm.cli.checks import check_checkpoint

    check_checkpoint(arguments.checkpoint)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(stderr=True)
    with _bar(console) as progress:
        task = progress.add_task("scoring", total=None, errors="")

        def on_begin(columns: Any) -> None:
            options = f"; options: {', '.join(columns.options)}" if columns.options else ""
            kept = f"; copied: {', '.join(columns.kept)}" if columns.kept else ""
            console.print(f"histories: {columns.source}{options}{kept}", highlight=False)

        def on_progress(done: Any) -> None:
            errors = f"{done.errors:,} errors" if done.errors else ""
            progress.update(task, total=done.total, completed=done.rows, errors=errors)

        report = score_parquet(
            arguments.checkpoint,
            arguments.inputs,
            arguments.out,
            history=arguments.history,
            prompt=arguments.prompt,
            options={**_json(arguments.options, "--options"), "n": arguments.n},
            last=arguments.last,
            rows_per_part=arguments.rows_per_part,
            engine=_json(arguments.engine, "--engine"),
            cluster=_cluster(arguments),
            on_begin=on_begin,
            on_progress=on_progress,
        )
    earlier = f", {report.kept:,} of them by an earlier run" if report.kept else ""
    print(f"{report.rows:,} rows in {arguments.out}{earlier}; {report.errors:,} have an error")
    return 0


def _bar(console: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[errors]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def _cluster(arguments: argparse.Namespace) -> Any:
    from importlib.util import find_spec

    from nezha_vllm.batch.on_ray import Cluster
    from nezha_vllm.cli import UserError

    if arguments.ray is None:
        if arguments.workers != 1:
            raise UserError("--workers needs --ray: auto for the cluster of this machine, local for a new one")
        return None
    if find_spec("ray") is None:
        raise UserError("Ray is not installed; pip install 'nezha-vllm[ray]'")
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}, must be at least 1")
    gpus = arguments.gpus if arguments.gpus is not None else float(Path("/dev/nvidiactl").exists())
    return Cluster(arguments.ray, arguments.workers, gpus, arguments.cpus)


def _json(text: str | None, flag: str) -> dict[str, Any]:
    import json

    from nezha_vllm.cli import UserError

    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"{flag} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag} must be a JSON object, got {text}")
    return found
