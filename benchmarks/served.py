"""Systems that are asked over HTTP: `vllm serve` with this project's checkpoint, or with the stock one."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stock import beside, stock_checkpoint
from benchmarks.workload import Cell, Workload, grid
from nezha_vllm.server import Server, ServerError, free_port

MODEL = "bench"


@dataclass(frozen=True)
class Target:
    """A running server and how to ask it: what the load generators need to know of a system."""

    system: str
    url: str
    workload: Workload
    group: int | None = None  # of its processes, on this machine
    gpus: str = ""

    @property
    def texts(self) -> list[str]:
        """Per row of the catalogue what a prompt says for it; the tokens are the same for every system."""
        return self.workload.item_texts if self.system == "nezha" else self.workload.code_texts

    def body(self, cell: Cell) -> dict[str, Any]:
        """The JSON of a request, without its prompt."""
        if self.system == "nezha":
            return {"model": MODEL, "n": cell.n, "vllm_xargs": {"beam_width": cell.beam_width}}
        if self.system == "vllm-one-token":
            return {"model": MODEL, "n": 1, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        beams = {"use_beam_search": True, "n": cell.beam_width, "max_tokens": self.workload.levels}
        return {"model": MODEL, **beams, "temperature": 0.0, "ignore_eos": True}

    def prompts(self, cell: Cell, seed: int) -> Iterator[str]:
        for rows in self.workload.histories(cell.prompt_tokens, seed):
            yield "".join(self.texts[row] for row in rows)


@dataclass(frozen=True)
class Probe:
    """One answer: how long it took and how many tokens the engine read."""

    milliseconds: float
    engine_tokens: int
    choices: int


def probe(target: Target, cell: Cell, seed: int, timeout: float = 300.0) -> Probe:
    """One request by itself. Raises ``RuntimeError`` with the server's own words where it refuses."""
    body = {**target.body(cell), "prompt": next(target.prompts(cell, seed))}
    request = urllib.request.Request(
        f"{target.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read().decode(errors='replace')[:300]}") from None
    except OSError as error:
        raise RuntimeError(f"no answer: {error}") from None
    milliseconds = 1000 * (time.perf_counter() - start)
    return Probe(milliseconds, answer["usage"]["prompt_tokens"], len(answer["choices"]))


def each_cell(arguments: argparse.Namespace, workload: Workload, measure: Callable[[Target, Cell], None]) -> None:
    """``measure`` every cell of every system, each system behind a server of its own."""
    for system in arguments.systems:
        try:
            with serving(system, arguments.model, workload, arguments.vllm_args) as target:
                for cell in grid(system, arguments.prompts, arguments.beams):
                    measure(target, cell)
        except RuntimeError as error:  # the other systems are still to be measured
            print(f"{system}: {error}", file=sys.stderr)


@contextmanager
def serving(system: str, checkpoint: str, workload: Workload, vllm_args: Sequence[str]) -> Iterator[Target]:
    """Start a system's server and stop it behind the block. Raises ``RuntimeError`` with the end of its log."""
    with starting(system, checkpoint, vllm_args) as server:
        yield ready(server, system, workload)


@contextmanager
def starting(
    system: str, checkpoint: str, vllm_args: Sequence[str], gpus: str = "", cores: str = ""
) -> Iterator[Server]:
    """The server, not ready yet. ``gpus``, "0,1", and ``cores``, "0-15", are those it may use; all if empty."""
    folder, arguments = Path(checkpoint), ["--served-model-name", MODEL, "--uvicorn-log-level", "warning"]
    if system != "nezha":
        folder = stock_checkpoint(checkpoint, beside(checkpoint))
    if system == "vllm-beam":  # which asks for 2 K logprobs; vLLM allows 20 unless told otherwise
        arguments += ["--max-logprobs", "-1"]
    log = Path(tempfile.mkdtemp(prefix="nezha-bench-")) / f"{system}.log"
    prefix = [*(["taskset", "-c", cores] if cores else []), *(["env", f"CUDA_VISIBLE_DEVICES={gpus}"] if gpus else [])]
    with Server(folder, free_port(), arguments=[*arguments, *vllm_args], log=log, prefix=prefix) as server:
        yield server


def ready(server: Server, system: str, workload: Workload, gpus: str = "") -> Target:
    """Wait for it. Raises ``RuntimeError`` with the end of its log."""
    try:
        seconds = server.wait_until_ready()
    except ServerError as error:
        raise RuntimeError(str(error)) from None
    print(f"{system}: ready after {seconds:.0f} s, log in {server.log}", flush=True)
    return Target(system, server.url, workload, server.process.pid, gpus)
