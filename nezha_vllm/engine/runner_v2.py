"""Model Runner V2 with lean steps: batches of whole new prompts take them, everything else is vLLM's own step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from nezha_vllm.engine.lean_step import LeanStep, make_lean_step
from nezha_vllm.engine.step_plan import LeanBatch, has_more_work


class LeanOutput(AsyncModelRunnerOutput):
    """A lean step's answers on their way to the host."""

    def __init__(self, req_ids: list[str], pending: Any) -> None:
        self.req_ids, self.pending = req_ids, pending

    def get_output(self) -> ModelRunnerOutput:
        """Wait and build what the scheduler reads.

        The event is not a blocking one, so this spins in the driver, without the interpreter's lock, until the GPU is
        done. vLLM's own output sleeps instead, and waking up costs 30 to 50 µs of a request that takes 2 ms.
        """
        self.pending.event.synchronize()
        return ModelRunnerOutput(
            req_ids=self.req_ids,
            req_id_to_index={req_id: row for row, req_id in enumerate(self.req_ids)},
            sampled_token_ids=[[0] for _ in self.req_ids],
            logprobs=LogprobsLists(*self.pending.payload()),
        )


class NezhaModelRunner(GPUModelRunner):
    """Overrides only; instances are made by vLLM and have their class swapped."""

    lean: LeanStep | None = None
    lean_steps = 0
    _launched: tuple[LeanBatch, Tensor] | None = None

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        size = super().capture_model(*args, **kwargs)
        if not kwargs.get("profile_only"):  # a rehearsal, whose cache and graphs are thrown away
            self.lean = make_lean_step(self)
        return size

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._launched = None
        if self.lean is None or intermediate_tensors is not None or args or kwargs:  # a dummy run has keywords
            return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)
        if self._is_idle(scheduler_output):
            return EMPTY_MODEL_RUNNER_OUTPUT
        taken = self.lean.take(scheduler_output)
        known = self.req_states.req_id_to_index
        if taken is None or any(req_id in known for req_id in taken[0].req_ids):
            return super().execute_model(scheduler_output, intermediate_tensors)
        if known:  # requests of vLLM's own steps may have finished; those of lean steps leave nothing behind
            self.finish_requests(scheduler_output)
        batch, graph = taken
        self._launched = batch, self.lean.launch(batch, graph)
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.lean is None or self._launched is None:
            return super().sample_tokens(grammar_output)
        (batch, states), self._launched = self._launched, None
        pending = self.lean.stage.run(states, batch.last_rows, batch.searches)
        self.lean_steps += 1
        return LeanOutput(batch.req_ids, pending)

    def _is_idle(self, scheduler_output: Any) -> bool:
        """Nothing to compute and nobody to forget: the engine's step behind the last request, on its way to sleep."""
        return (
            scheduler_output.total_num_scheduled_tokens == 0
            and not self.req_states.req_id_to_index
            and not has_more_work(scheduler_output)
        )
