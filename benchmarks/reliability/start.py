"""Starting the server that a measurement is about, and what it is asked."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reliability.questions import Questions, some_histories
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.server import Server, free_port

# on scores; 1B of bfloat16 differ by up to 0.14 between one batch and another
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.25}
MARGINS = {"float32": 1, "bfloat16": 4}


class MeasuredServer(Server):
    """With what was ``wrong`` with it: its log tells more."""

    log: Path
    wrong = 0


@contextmanager
def started(
    checkpoint: Path, vllm_args: Sequence[str] = (), dtype: str = "float32", log: Path | None = None
) -> Iterator[MeasuredServer]:
    """A server that is ready. Its log, ``server.log``, stays if an error or ``server.wrong`` ends it, or as ``log``."""
    given = ["--dtype", dtype, "--disable-uvicorn-access-log", *vllm_args]
    folder = Path(tempfile.mkdtemp(prefix="nezha-reliability-"))
    server, well = MeasuredServer(checkpoint, free_port(), arguments=given, log=log or folder / "log.txt"), False
    try:
        with server:
            print(f"ready after {server.wait_until_ready(timeout=900):.0f} s", flush=True)
            yield server
        well = not server.wrong
    finally:
        if well or log:
            shutil.rmtree(folder)
        if not well:
            print(f"the server's log: {server.log}", flush=True)


def questions(arguments: argparse.Namespace, catalogues: Sequence[Catalogue] = (), url: str | None = None) -> Questions:
    """What `parser` has arguments for, answered by transformers for these catalogues or by the server at ``url``.

    Without catalogues it is the checkpoint's own.
    """
    own = Catalogue.load(arguments.model / "catalogue")
    histories = some_histories(own, arguments.histories)
    tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    margin = MARGINS[arguments.dtype] if arguments.margin is None else arguments.margin
    more = {"depth": arguments.depth, "beam_width": arguments.beam_width, "tolerance": tolerance, "margin": margin}
    if url is not None:
        found = Questions.of_server(url, histories, arguments.n, **more)
    else:
        asked = (arguments.model, catalogues or [own], histories, arguments.n)
        found = Questions.of_model(*asked, dtype=arguments.dtype, **more)
    print(found.mistakable(), flush=True)
    return found


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """With the checkpoint alone."""
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything behind -- goes to vLLM: … -- --api-server-count 2",
    )
    found.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint with a catalogue in it")
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what all measurements ask for that have questions and expected answers."""
    found = bare_parser(description)
    found.add_argument("--histories", type=int, default=64, help="different prompts (default %(default)s)")
    found.add_argument("--n", type=int, default=10, help="items of an answer (default %(default)s)")
    found.add_argument("--depth", type=int, help="expected items a prompt, where scores are inexact; default n")
    found.add_argument("--beam-width", type=int, metavar="K", help="default: the checkpoint's")
    found.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of server and model (%(default)s)")
    found.add_argument(
        "--margin",
        type=int,
        metavar="M",
        help="what a beam M times as wide finds may come, what one M times narrower finds must; "
        + ", ".join(f"{margin} in {dtype}" for dtype, margin in MARGINS.items()),
    )
    tolerances = ", ".join(f"{tolerance:g} in {dtype}" for dtype, tolerance in TOLERANCES.items())
    found.add_argument("--tolerance", type=float, help=f"on scores; default {tolerances}")
    return found


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the measurement and of vLLM."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:cut]), list(argv[cut + 1 :])
