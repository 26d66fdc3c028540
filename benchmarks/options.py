"""Command lines of the measurements: what they share, and how a command runs each system in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.additional import nezha_options
from benchmarks.rows import RESULTS
from benchmarks.workload import parse_beams

OFFLINE = ("nezha", "vllm-beam", "vllm-one-token", "hf-beam", "hf-nezha")
SERVED = ("nezha", "vllm-beam", "vllm-one-token")
OVER = ("http", "offline", "in-process")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything behind -- goes to vLLM: … -- --max-model-len 2048 --no-enable-prefix-caching",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="NEZHA checkpoint, see `nezha init`")
    parser.add_argument("--label", help="name of the model in the rows (default: its folder's)")
    parser.add_argument("--systems", nargs="+", choices=OFFLINE, default=["nezha"], metavar="NAME", help=str(OFFLINE))
    parser.add_argument(
        "--over",
        choices=OVER,
        default="http",
        help="HTTP, LLM.generate with the engine in its own process (vLLM's default), or in this one",
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[128], metavar="TOKENS")
    parser.add_argument(
        "--beams", nargs="+", type=parse_beams, default=[(50, 50)], metavar="K:n", help="beam widths and items, or K"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="budget of a cell (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the histories")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rows go")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``vllm_args`` from behind ``--`` and ``argv`` as they came."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:cut])
    arguments.argv, arguments.vllm_args = argv[:cut], argv[cut + 1 :]
    try:
        nezha_options(arguments.vllm_args)  # which rows count the items by
    except ValueError as error:
        parser.error(str(error))
    if "--dtype" not in arguments.vllm_args:  # vLLM's "auto" may choose differently for the model and its peers
        arguments.vllm_args = ["--dtype", checkpoint_dtype(arguments.model, parser), *arguments.vllm_args]
    arguments.prefix_caching = "--no-enable-prefix-caching" not in arguments.vllm_args
    arguments.label = arguments.label or Path(arguments.model).resolve().name
    unserved = [name for name in arguments.systems if name not in SERVED]
    if arguments.over == "http" and unserved:
        parser.error(f"{', '.join(unserved)}: has no server; add --over in-process")
    return arguments


def checkpoint_dtype(folder: str, parser: argparse.ArgumentParser) -> str:
    config = Path(folder, "config.json")
    if not config.is_file():
        parser.error(f"no checkpoint at {folder}; make one with `nezha init`")
    return str(json.loads(config.read_text(encoding="utf-8")).get("dtype", "auto"))


def run_apart(module: str, arguments: argparse.Namespace) -> int:
    """Run the command once a system, each in a fresh process: no GPU memory, compiled code or setting is shared."""
    statuses = []
    for system in arguments.systems:
        tail = ["--systems", system, "--", *arguments.vllm_args]
        statuses.append(subprocess.run([sys.executable, "-m", module, *arguments.argv, *tail]).returncode)
    return max(statuses)
