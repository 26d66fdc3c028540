"""A whole plan of measurements by one command: checkpoints, servers, what is asked of each, and commands besides.

python -m benchmarks.run benchmarks/plans/h100.toml --folder models
python -m benchmarks.run benchmarks/plans/h100.toml --folder models --only nezha stock --seconds 3

A server starts once, and everything asked of its systems follows. Steps are made one after the other, since two that
share a machine's cores disturb each other. One that fails is reported at the end, and the others are made.
With --together all servers start at once and wait for their turn, held: they need a minute or two each, and a machine
of several GPUs has the cores for it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import latency, throughput, wrk
from benchmarks.additional import nezha_options
from benchmarks.machine import ROOT
from benchmarks.measure import Recorder
from benchmarks.options import SERVED, make_parser, parse
from benchmarks.rows import RESULTS
from benchmarks.served import Target, ready, starting
from benchmarks.vllm_bench import VllmBench
from benchmarks.workload import Cell, Workload, grid, parse_beams
from nezha_vllm.server import Server, ServerError


@dataclass(frozen=True)
class ServerStep:
    """One server and what is asked of it. Cells are texts "prompt tokens:K:n".

    ``systems`` share a server, so they must share a checkpoint: "nezha" alone, or the stock ones together, the first
    of which sets the server's flags. ``gpus`` and ``cores`` are those it may use, "0,1" and "0-15"; all if empty.
    """

    name: str
    systems: list[str]
    model: str
    label: str = ""
    vllm: list[str] = field(default_factory=list)
    gpus: str = ""
    cores: str = ""
    latency: list[str] = field(default_factory=list)
    throughput: list[str] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)
    rates: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CommandStep:
    """A Python module and its arguments; {model:NAME} stands for a checkpoint's folder, {results} for the rows'."""

    name: str
    command: list[str]


@dataclass(frozen=True)
class Plan:
    models: dict[str, list[str]]  # name → arguments of `nezha init` behind the folder
    steps: list[ServerStep | CommandStep]
    together: list[str] = field(default_factory=list)  # for vLLM, where servers share GPUs: how much memory each takes

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises ``ValueError`` naming the step and field that is wrong."""
        with path.open("rb") as file:
            raw = tomllib.load(file)
        models = {name: list(model["init"]) for name, model in raw.get("models", {}).items()}
        steps = [_step(path, number, step) for number, step in enumerate(raw.get("steps", []), 1)]
        for number, step in enumerate(steps):
            if step.name in [other.name for other in steps[:number]]:  # servers are found by it
                raise ValueError(f"{path}: two steps are called {step.name!r}")
            if isinstance(step, ServerStep) and step.model not in models:
                raise ValueError(f"{path}: step {step.name} wants model {step.model!r}, the plan has {sorted(models)}")
        return cls(models, steps, list(raw.get("together", [])))


def _step(path: Path, number: int, raw: Mapping[str, Any]) -> ServerStep | CommandStep:
    kind = CommandStep if "command" in raw else ServerStep
    known = {item.name for item in fields(kind)}
    try:
        if unknown := sorted(set(raw) - known):
            raise TypeError(f"unknown fields {unknown}, known are {sorted(known)}")
        step = kind(**raw)
    except TypeError as error:
        raise ValueError(f"{path}: step {number}: {error}") from None
    if isinstance(step, ServerStep):
        if bad := [name for name in step.systems if name not in SERVED] or not step.systems:
            raise ValueError(f"{path}: step {step.name}: systems are some of {SERVED}, not {bad or 'none'}")
        if "nezha" in step.systems and len(step.systems) > 1:
            raise ValueError(f"{path}: step {step.name}: nezha has a checkpoint, and so a server, of its own")
        for text in step.latency + step.throughput:
            try:
                parse_cell(text)
            except ValueError:
                raise ValueError(f"{path}: step {step.name}: {text!r}: write prompt tokens:K:n, 1 ≤ n ≤ K") from None
        try:
            nezha_options(step.vllm)
        except ValueError as error:
            raise ValueError(f"{path}: step {step.name}: {error}") from None
    return step


def parse_cell(text: str) -> Cell:
    """``128:512:50`` is a prompt of 128 tokens, K = 512, n = 50."""
    prompt, _, beams = text.partition(":")
    return Cell(int(prompt), *parse_beams(beams))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="checkpoints; made where missing")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps (default: all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="budget of a cell (default %(default)s)")
    parser.add_argument("--together", action="store_true", help="start all servers first, then ask one after the other")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rows go")
    arguments = parser.parse_args(argv)
    plan = Plan.load(arguments.plan)
    names = [step.name for step in plan.steps]
    if unknown := [name for name in arguments.only or [] if name not in names]:
        parser.error(f"no steps {unknown}; the plan has {names}")
    steps = [step for step in plan.steps if not arguments.only or step.name in arguments.only]
    failed = []
    servers = {step.name: StepServer(step, plan, arguments) for step in steps if isinstance(step, ServerStep)}
    with ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)
        if arguments.together:
            for name, server in servers.items():
                try:
                    server.start()
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # it is tried again in its turn
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
            for server in servers.values():  # while one starts, others would be slow
                server.wait()
            for server in servers.values():
                server.hold()
            print("all servers have started", flush=True)
        for step in steps:
            start = time.monotonic()
            try:
                if isinstance(step, CommandStep):
                    run_command(step, plan, arguments)
                else:
                    servers[step.name].start()
                    servers[step.name].ask()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failed.append(step.name)
                print(f"{step.name}: {error}", file=sys.stderr, flush=True)
            finally:
                if step.name in servers:
                    servers[step.name].stop()
            print(f"{step.name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_command(step: CommandStep, plan: Plan, arguments: argparse.Namespace) -> None:
    argv = [fill_in(word, plan, arguments) for word in step.command]
    subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, check=True)


def fill_in(word: str, plan: Plan, arguments: argparse.Namespace) -> str:
    if word.startswith("{model:") and word.endswith("}"):
        return str(checkpoint(word[len("{model:") : -1], plan, arguments.folder))
    return str(arguments.results.absolute()) if word == "{results}" else word


def checkpoint(name: str, plan: Plan, folder: Path) -> Path:
    """Its folder, made by `nezha init` if it is not there. Raises ``RuntimeError`` for a model that is not planned."""
    if name not in plan.models:
        raise RuntimeError(f"no model {name!r} in the plan, which has {sorted(plan.models)}")
    out = folder.absolute() / name
    if not (out / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "nezha_vllm.cli", "init", *plan.models[name], str(out)], check=True)
    return out


class StepServer:
    """The server of a step, and what is asked of it."""

    def __init__(self, step: ServerStep, plan: Plan, arguments: argparse.Namespace) -> None:
        self.step, self.plan, self.arguments = step, plan, arguments
        self.server: Server | None = None
        self._running = ExitStack()

    def start(self) -> None:
        """Unless it has started; not ready yet. Raises ``RuntimeError`` without a checkpoint."""
        if self.server is not None:
            return
        step, arguments = self.step, self.arguments
        model = checkpoint(step.model, self.plan, arguments.folder)
        argv = ["--model", str(model), "--label", step.label or step.model, "--results", str(arguments.results)]
        together = self.plan.together if arguments.together else []
        more = ["--seconds", str(arguments.seconds), "--", *step.vllm, *together]
        self.asked = parse(make_parser(""), [*argv, *more])
        self.asked.clients, self.asked.rates, self.asked.processes = step.clients, step.rates, 4
        self.workload = Workload.of(model)
        start = starting(step.systems[0], str(model), self.asked.vllm_args, step.gpus, step.cores)
        self.server = self._running.enter_context(start)

    def stop(self) -> None:
        self._running.close()

    def wait(self) -> None:
        """Until it is ready or has failed, which it says in its turn."""
        if self.server is not None:
            with suppress(ServerError):
                self.server.wait_until_ready()

    def hold(self) -> None:
        """Until it is asked: also a server that nobody asks takes some of the cores."""
        if self.server is not None:
            self.server.pause()

    def ask(self) -> None:
        """Everything of the step, once it is ready. Raises ``RuntimeError`` with the server's words."""
        assert self.server is not None, "it has started"
        self.server.resume()
        alone, loaded = (Recorder(name, self.asked, self.workload) for name in ("latency", "throughput"))
        needed = 0 if wrk.installed() else self.asked.processes
        try:
            with VllmBench(needed) as bench:
                target = ready(self.server, self.step.systems[0], self.workload, self.step.gpus)
                for system in self.step.systems:
                    ask(self.step, replace(target, system=system), alone, loaded, self.asked, bench)
        finally:
            for recorder in (alone, loaded):
                if recorder.rows:
                    recorder.print()


def ask(
    step: ServerStep,
    target: Target,
    alone: Recorder,
    loaded: Recorder,
    asked: argparse.Namespace,
    bench: VllmBench,
) -> None:
    for cell in cells(step.latency, target.system):
        latency.measure_http(alone, target, cell, asked, None if wrk.installed() else bench)
    for cell in cells(step.throughput, target.system):
        throughput.sweep(loaded, target, cell, asked, bench)


def cells(texts: Sequence[str], system: str) -> list[Cell]:
    """As the system answers them, each once."""
    answered = [grid(system, [cell.prompt_tokens], [(cell.beam_width, cell.n)]) for cell in map(parse_cell, texts)]
    return list(dict.fromkeys(cell for found in answered for cell in found))


if __name__ == "__main__":
    sys.exit(main())
