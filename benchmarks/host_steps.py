"""What the host does for a request: the main steps of vLLM and of this project, timed where they stand."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# In the order of a request. Of several places with one name only those that a version has are timed.
STEPS = [
    ("render the prompt", "vllm.entrypoints.common.offline:OfflineInferenceMixin._preprocess_cmpl"),
    ("check the options, build the request", "vllm.v1.engine.input_processor:InputProcessor.process_inputs"),
    ("hand it to the engine", "vllm.v1.engine.core_client:InprocClient.add_request"),
    ("schedule", "vllm.v1.core.sched.scheduler:Scheduler.schedule"),
    ("lean step: is it one", "nezha_vllm.engine.lean_step:LeanStep.take"),
    ("lean step: plan, input kernel", "nezha_vllm.engine.lean_step:LeanStep._prepare"),
    ("launch the backbone's graph", "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.run_fullgraph"),
    ("rest of execute_model", "nezha_vllm.engine.runner_v2:NezhaModelRunner.execute_model"),
    ("rest of execute_model", "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model"),
    ("rest of execute_model", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model"),
    ("draft stage: options", "nezha_vllm.engine.draft_graphs:DraftGraphs.stage"),
    ("draft stage: launches", "nezha_vllm.engine.draft_graphs:DraftGraphs.run"),
    ("draft stage: rest", "nezha_vllm.engine.draft_stage:DraftStage.run"),
    ("draft stage: rest", "nezha_vllm.engine.draft_stage:DraftStage.__call__"),
    ("draft stage: rest", "nezha_vllm.engine.runner_v2:NezhaModelRunner.sample_tokens"),
    ("wait for the GPU", "nezha_vllm.engine.runner_v2:LeanOutput.get_output"),
    ("gather", "nezha_vllm.engine.draft_stage:Pending.payload"),
    ("update_from_output", "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"),
    ("process_outputs", "vllm.v1.engine.output_processor:OutputProcessor.process_outputs"),
]
REST = "everything else"


@dataclass(frozen=True)
class Span:
    """Nanoseconds of ``time.time_ns``."""

    step: str
    start: int
    end: int
    depth: int


@dataclass
class Request:
    """One call: its spans, and µs of each step without the steps inside it."""

    spans: list[Span] = field(default_factory=list)
    own_us: dict[str, float] = field(default_factory=dict)
    total_us: float = 0.0


class HostSteps:
    """Times steps while ``watching``; each call of ``request`` is one request."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._inner: list[int] = []  # of each step under way the time spent in steps inside it

    @contextmanager
    def watching(self) -> Iterator[None]:
        found = [(step, place) for step, name in STEPS if (place := _find(name)) is not None]
        for step, (owner, name, function) in found:
            setattr(owner, name, self._timed(step, function))
        try:
            yield
        finally:
            for _, (owner, name, function) in reversed(found):
                setattr(owner, name, function)

    def request(self, action: Callable[[], object]) -> None:
        request = Request()
        self.requests.append(request)
        start = time.perf_counter_ns()
        action()
        request.total_us = (time.perf_counter_ns() - start) / 1000
        request.own_us[REST] = request.total_us - sum(request.own_us.values())

    def medians(self) -> dict[str, tuple[float, float]]:
        """Per step its median µs a request and how often it came, in the order of a request, the rest last."""
        order = dict.fromkeys([*(step for step, _ in STEPS), REST])
        found = {}
        for step in order:
            times = [request.own_us.get(step, 0.0) for request in self.requests]
            if any(times):
                calls = sum(span.step == step for request in self.requests for span in request.spans)
                found[step] = (median(times), calls / len(self.requests))
        return found

    def _timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.requests:
                return function(*args, **kwargs)
            self._inner.append(0)
            start, clock = time.perf_counter_ns(), time.time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter_ns() - start
                own = spent - self._inner.pop()
                request = self.requests[-1]
                request.own_us[step] = request.own_us.get(step, 0.0) + own / 1000
                request.spans.append(Span(step, clock, clock + spent, len(self._inner)))
                if self._inner:
                    self._inner[-1] += spent

        return timed


def _find(place: str) -> tuple[Any, str, Callable[..., Any]] | None:
    """Class, name and function of ``module:Class.function``; None where the running engine has no such thing."""
    module, _, path = place.partition(":")
    owner, _, name = path.partition(".")
    found = getattr(sys.modules.get(module), owner, None)
    function = vars(found).get(name) if found else None
    return (found, name, function) if found and function else None
