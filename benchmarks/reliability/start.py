"""Starting the server that a measurement is about."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nezha_vllm.server import Server, free_port


@contextmanager
def started(checkpoint: Path, vllm_args: Sequence[str] = ()) -> Iterator[Server]:
    """A server in float32 that is ready; its log is in ``server.log`` until it ends."""
    with tempfile.TemporaryDirectory(prefix="nezha-reliability-") as folder:
        given = ["--dtype", "float32", "--disable-uvicorn-access-log", *vllm_args]
        with Server(checkpoint, free_port(), arguments=given, log=Path(folder, "log.txt")) as server:
            print(f"ready after {server.wait_until_ready(timeout=900):.0f} s", flush=True)
            yield server


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
    return found


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the measurement and of vLLM."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:cut]), list(argv[cut + 1 :])
