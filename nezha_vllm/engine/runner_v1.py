"""Model Runner V1 has no model-level sampler hook: a worker swaps in a runner with the two overrides needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from nezha_vllm.engine.draft_stage import DraftStage, Search


class _SamplerV1:
    """Stands where V1 keeps its sampler; reads hidden states and writes the payload into the logprobs tensors."""

    logprobs_mode = "raw_logprobs"

    def __init__(self, runner: GPUModelRunner, stage: DraftStage) -> None:
        self.runner, self.stage = runner, stage

    def __call__(self, logits: Tensor, sampling_metadata: Any, **_: Any) -> SamplerOutput:
        batch = self.runner.input_batch
        num_requests = batch.num_reqs
        if len(logits) != num_requests * self.stage.num_states:  # a profiling run, without requests
            searches: list[Search | None] = [None] * len(logits)
        else:
            unfinished = self.runner.discard_request_mask.np[:num_requests]
            searches = [
                None if skip else Search.of(self.runner.requests[request_id].sampling_params.extra_args)
                for request_id, skip in zip(batch.req_ids, unfinished, strict=True)
            ]
        token_ids, log_probs, ranks = self.stage(logits, searches)
        sampled = torch.zeros(len(searches), 1, dtype=torch.int32, device=logits.device)
        return SamplerOutput(sampled, LogprobsTensors(token_ids, log_probs, ranks))


class NezhaRunnerMixin:
    """Overrides only; instances are made by vLLM and have their class swapped."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        model, config = self.model, self.vllm_config  # type: ignore[attr-defined]
        self.draft_stage = DraftStage(model.draft_head, config, model.item_scores(config.model_config))
        self.sampler = _SamplerV1(self, self.draft_stage)  # type: ignore[arg-type]

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        last, *rest = super()._prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        return self.draft_stage.widen(last), *rest
