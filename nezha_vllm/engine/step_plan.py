"""Which batches a lean step takes, and how one is packed for the device. Runs on the host, NumPy only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nezha_vllm.engine.draft_stage import Search

PLAN_FIELDS = 5  # as in kernels/step_inputs.py, which cannot be imported where there is no Triton

# parts of a scheduler's output that ask for more than a forward pass over new requests
MORE_WORK = (
    "scheduled_spec_decode_tokens",
    "scheduled_encoder_inputs",
    "free_encoder_mm_hashes",
    "has_structured_output_requests",
    "new_block_ids_to_zero",
    "kv_cache_block_copies",
    "kv_connector_metadata",
    "ec_connector_metadata",
    "aux_output_connector_metadata",
)


class LeanBatch(NamedTuple):
    """New requests whose prompts end in this step. One entry a request in every list."""

    req_ids: list[str]
    searches: list[Search]
    tokens: list[list[int]]  # to compute now
    computed: list[int]  # tokens in front of them that the cache holds
    blocks: list[list[int]]
    num_tokens: int

    @property
    def num_words(self) -> int:
        return PLAN_FIELDS * len(self.req_ids) + self.num_tokens + sum(map(len, self.blocks))

    @property
    def last_rows(self) -> np.ndarray:
        """Row of each request's last token."""
        return np.cumsum([len(tokens) for tokens in self.tokens]) - 1


def has_more_work(scheduler_output: Any) -> bool:
    return any(getattr(scheduler_output, name, None) for name in MORE_WORK)


def whole_prompts(scheduler_output: Any, num_states: int) -> LeanBatch | None:
    """The batch, if each of its requests is new, ends its prompt here and is finished after it; else None.

    Such a request has no second step: it asks for one token, vLLM never schedules past ``max_tokens``, and one that is
    preempted while its step runs keeps what the step returns.
    """
    new, scheduled = scheduler_output.scheduled_new_reqs, scheduler_output.num_scheduled_tokens
    if not new or len(new) != len(scheduled) or has_more_work(scheduler_output):
        return None
    batch = LeanBatch([], [], [], [], [], scheduler_output.total_num_scheduled_tokens)
    for request in new:
        params, tokens, computed = request.sampling_params, request.prefill_token_ids, request.num_computed_tokens
        search = Search.of(params.extra_args) if params is not None else None
        if (
            search is None  # vLLM's own warm-up
            or params.max_tokens != 1
            or params.prompt_logprobs is not None
            or tokens is None
            or computed + scheduled[request.req_id] != len(tokens)
            or len(tokens) - computed < num_states
            or len(request.block_ids) != 1
            or request.lora_request is not None
            or request.prompt_embeds is not None
            or request.mm_features
        ):
            return None
        batch.req_ids.append(request.req_id)
        batch.searches.append(search)
        batch.tokens.append(tokens[computed:])
        batch.computed.append(computed)
        batch.blocks.append(request.block_ids[0])
    return batch


def write_plan(plan: np.ndarray, batch: LeanBatch) -> None:
    """Pack a batch as ``kernels/step_inputs.py`` reads it; ``plan`` is int32 and holds ``batch.num_words`` or more."""
    fields: list[int] = []
    ids_at = PLAN_FIELDS * len(batch.req_ids)
    blocks_at = ids_at + batch.num_tokens
    start = 0
    for tokens, computed, blocks in zip(batch.tokens, batch.computed, batch.blocks, strict=True):
        length, num_blocks = len(tokens), len(blocks)
        fields += (start, length, computed, blocks_at, num_blocks)
        plan[ids_at + start : ids_at + start + length] = tokens
        plan[blocks_at : blocks_at + num_blocks] = blocks
        start += length
        blocks_at += num_blocks
    plan[:ids_at] = fields
