"""Model Runner V2: the model owns its sampler through ``ModelState.custom_sampler``."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from nezha_vllm.engine.draft_stage import DraftStage, Search


class NezhaModelState(DefaultModelState):
    def custom_sampler(self, base: Any) -> tuple[NezhaSampler, None]:
        item_scores = self.model.item_scores(self.vllm_config.model_config)
        self.draft_stage = DraftStage(self.model.draft_head, self.vllm_config, item_scores)
        return NezhaSampler(base, self.draft_stage), None

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        super().preprocess_state(input_batch, *args, **kwargs)
        input_batch.logits_indices = self.draft_stage.widen(input_batch.logits_indices)

    def prepare_attn(self, input_batch: Any, *args: Any, for_capture: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Graphs are captured for the longest query they may replay.

        vLLM 0.26 captures mixed batches with query length 1, for which FlashAttention 3 drops the causal mask at head
        sizes up to 64; 0.32 sets ``max_query_len`` itself.
        """
        if for_capture and not hasattr(input_batch, "max_query_len"):
            longest = np.full_like(input_batch.num_scheduled_tokens, input_batch.num_tokens)
            input_batch = replace(input_batch, num_scheduled_tokens=longest)
        return super().prepare_attn(input_batch, *args, for_capture=for_capture, **kwargs)


class NezhaSampler:
    """The contract that Model Runner V2 asks of a sampler, filled with the draft stage."""

    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, base: Any, stage: DraftStage) -> None:
        self.sampling_states = base.sampling_states
        self.stage = stage
        self.searches: dict[int, Search | None] = {}

    def add_request(self, req_idx: int, *args: Any) -> None:
        self.searches[req_idx] = Search.of(args[-1].extra_args)

    def apply_staged_writes(self) -> None:
        """Nothing is staged: options stay on the host."""

    def __call__(self, states: Tensor, input_batch: Any) -> SamplerOutput:
        num_requests = input_batch.num_reqs
        finished = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens >= input_batch.prefill_len_np
        finished = finished[:num_requests]
        searches: list[Search | None] = [None] * num_requests
        if len(states) == num_requests * self.stage.num_states:
            searches = [
                self.searches.get(int(slot)) if done else None
                for slot, done in zip(input_batch.idx_mapping_np[:num_requests], finished, strict=True)
            ]
        token_ids, log_probs, ranks = self.stage(states, searches)
        num_sampled = torch.from_numpy(finished.astype(np.int32)).to(states.device)
        return SamplerOutput(
            sampled_token_ids=torch.zeros(num_requests, 1, dtype=torch.int64, device=states.device),
            logprobs_tensors=LogprobsTensors(token_ids, log_probs, ranks),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=torch.zeros_like(num_sampled),
        )
