"""The whole path on MovieLens 100K: prepare, tokenize, train, evaluate, serve, and recommend to real users.

  nezha demo --folder demo
  nezha demo --folder demo --until evaluate

Each step is shown as the `nezha` command that does the same. A finished step is kept for the next run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "all of it on MovieLens 100K, ending with recommendations to real users"
BUILDING = ("prepare", "tokenize", "train", "evaluate")
CODES = "64"  # 256 a level say nothing about 1,682 items any more: docs/training.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("demo"), metavar="DIR", help="working folder (%(default)s)")
    parser.add_argument("--until", choices=BUILDING, help="stop after this step")
    parser.add_argument("--users", type=int, default=20, metavar="N", help="how many users to ask for (%(default)s)")
    parser.add_argument("--n", type=int, default=10, help="how many films to recommend (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of users (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    import signal
    import time

    from rich.console import Console

    from nezha_vllm.cli.steps import StepFailed
    from nezha_vllm.server import ServerError

    console = Console()
    start = time.monotonic()
    # a service manager's stop takes the same way out as Ctrl-C, past every `with`
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        _build(arguments.folder, arguments.until, console)
        if arguments.until is None:
            _recommend(arguments, console)
            console.print(f"all done in {time.monotonic() - start:.0f} s; `make serve` leaves the server up")
    except StepFailed as failure:
        return failure.status
    except ServerError as error:
        console.print(f"nezha demo: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


def _build(folder: Path, until: str | None, console: Console) -> None:
    from nezha_vllm.cli.steps import Steps

    dataset, catalogue, checkpoint = (folder / name for name in ("dataset", "catalogue", "checkpoint"))
    evaluation = folder / "evaluation.json"
    commands = [
        (["prepare", "movielens-100k", "--out", str(dataset)], dataset),
        (["tokenize", str(dataset), "--out", str(catalogue), "--codes", CODES], catalogue),
        (["train", str(dataset), str(catalogue), "--out", str(checkpoint)], checkpoint),
        (["evaluate", str(checkpoint), str(dataset), "--json", str(evaluation)], evaluation),
    ]
    steps = Steps(folder, console)
    for argv, output in commands:
        ran = steps.run(argv, output)
        if argv[0] == "evaluate" and not ran:
            _show_evaluation(evaluation, console)
        if argv[0] == until:
            return


def _show_evaluation(path: Path, console: Console) -> None:
    import json
    from dataclasses import fields

    from nezha_vllm.training.comparison import Comparison, table

    stored = json.loads(path.read_text(encoding="utf-8"))
    console.print(
        table(Comparison(**{field.name: stored[field.name] for field in fields(Comparison) if field.name in stored}))
    )


def _recommend(arguments: argparse.Namespace, console: Console) -> None:
    from nezha_vllm.cli.audience import ask, draw, show
    from nezha_vllm.server import Server, free_port
    from nezha_vllm.training.start import trained_history

    folder, port = arguments.folder, free_port()
    viewers = draw(folder, arguments.users, arguments.seed, trained_history(folder / "checkpoint"))
    console.print(
        f"\n[bold]$ nezha serve {folder / 'checkpoint'} --port {port}[/bold]", highlight=False, soft_wrap=True
    )
    with Server(folder / "checkpoint", port, log=folder / "server.log") as server:
        with console.status("starting vLLM …") as status:
            seconds = server.wait_until_ready(tick=lambda elapsed: status.update(f"starting vLLM … {elapsed:.0f} s"))
        console.print(f"[dim]ready after {seconds:.0f} s; its log is {server.log}[/dim]", highlight=False)
        answers = ask(server.url, viewers, arguments.n)
    show(console, folder / "catalogue", viewers, answers, arguments.n)
