"""Load by `vllm bench serve`, open and closed loop, where `wrk` is not installed.

One process of it is an asyncio loop in Python and saturates before a fast server does, so several share the load: the
sum of independent Poisson processes is a Poisson process. It always asks for a stream, and a request ends with the last
choice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.rows import BEHIND, latencies
from benchmarks.served import MODEL, Target
from benchmarks.workload import Cell


class VllmBench:
    """Worker processes that import vLLM while the server starts; leaving the ``with`` block ends them."""

    def __init__(self, processes: int = 4) -> None:
        self.count = processes
        self.folder = Path(tempfile.mkdtemp(prefix="nezha-vllm-bench-"))
        self._workers: list[subprocess.Popen[str]] = []
        self._ready = False

    def __enter__(self) -> VllmBench:
        argv = [sys.executable, "-m", "benchmarks.vllm_bench_worker"]
        for number in range(self.count):
            with (self.folder / f"{number}.log").open("w") as log:
                self._workers.append(
                    subprocess.Popen(
                        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                    )
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()

    def wait_until_ready(self) -> None:
        if not self._ready:
            for number in range(self.count):
                self._reply(number)
            self._ready = True

    def open_loop(self, target: Target, cell: Cell, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Poisson arrivals at ``rate`` requests/s in all. Columns of a row."""
        total = max(round(rate * seconds), 20)
        found = self._run(target, cell, self.count, total, seed, lambda _: ["--request-rate", str(rate / self.count)])
        if found["requests_per_s"] < BEHIND * rate:
            found["note"] = f"fell behind the arrivals: {found['requests_per_s']:.0f} of {rate:.0f} req/s"
        return found

    def closed_loop(
        self, target: Target, cell: Cell, clients: int, expected_ms: float, seconds: float, seed: int
    ) -> dict[str, Any]:
        """``clients`` requests in flight. ``expected_ms`` of one alone bounds how many are sent. Columns of a row."""
        count = min(self.count, clients)
        total = max(2 * clients, round(seconds * 1000 / expected_ms))
        shares = [clients // count + (number < clients % count) for number in range(count)]
        return self._run(target, cell, count, total, seed, lambda number: ["--max-concurrency", str(shares[number])])

    def _run(
        self, target: Target, cell: Cell, count: int, total: int, seed: int, load: Callable[[int], list[str]]
    ) -> dict[str, Any]:
        self.wait_until_ready()
        prompts = target.prompts(cell, seed)
        for number in range(count):
            share = total // count + (number < total % count)
            file = self.folder / f"{number}.jsonl"
            file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in islice(prompts, share)))
            self._send(number, [*self._arguments(target, cell, number, share, seed), *load(number)])
        errors = [error for error in map(self._reply, range(count)) if error]
        if errors:
            raise RuntimeError(f"vllm bench serve failed: {errors[0][:200]}; all of it in {self.folder}")
        return self._merge(count)

    def _arguments(self, target: Target, cell: Cell, number: int, share: int, seed: int) -> list[str]:
        body = {name: value for name, value in target.body(cell).items() if name != "model"}
        return [
            *("--backend", "openai", "--base-url", target.url, "--endpoint", "/v1/completions", "--model", MODEL),
            *("--dataset-name", "custom", "--dataset-path", str(self.folder / f"{number}.jsonl")),
            *("--custom-output-len", "1", "--num-prompts", str(share), "--seed", str(1000 * seed + number)),
            *("--extra-body", json.dumps(body), "--percentile-metrics", "e2el", "--ready-check-timeout-sec", "0"),
            *("--save-result", "--save-detailed", "--result-dir", str(self.folder)),
            *("--result-filename", f"{number}.json", "--skip-tokenizer-init", "--disable-shuffle", "--disable-tqdm"),
        ]

    def _merge(self, count: int) -> dict[str, Any]:
        results = [json.loads((self.folder / f"{number}.json").read_text()) for number in range(count)]
        good = [
            1000 * latency
            for result in results
            for latency, error in zip(result["latencies"], result["errors"], strict=True)
            if not error
        ]
        failed = [error for result in results for error in result["errors"] if error]
        if not good:
            raise RuntimeError(f"vllm bench serve got no answer: {failed[0][-300:]}")
        return {
            "generator": f"vllm bench serve × {count}",
            "requests": len(good),
            "errors": len(failed),
            "seconds": max(result["duration"] for result in results),
            "requests_per_s": sum(result["completed"] / result["duration"] for result in results),
            **latencies(good),
        }

    def _send(self, number: int, arguments: list[str]) -> None:
        pipe = self._workers[number].stdin
        assert pipe is not None
        pipe.write(json.dumps(arguments) + "\n")
        pipe.flush()

    def _reply(self, number: int) -> str | None:
        pipe = self._workers[number].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            log = (self.folder / f"{number}.log").read_text()[-1000:]
            raise RuntimeError(f"vllm bench serve ended by itself: {log}")
        error: str | None = json.loads(line).get("error")
        return error
