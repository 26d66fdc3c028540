"""One step of Model Runner V2 for nothing but whole new prompts, without the state that vLLM keeps of a request.

vLLM's own step stages a request's tokens, lengths and blocks in device tables, gathers them into the buffers its CUDA
graph reads, samples, and updates the tables: 11 launches a request, 0.9 ms, for a request that is over after this step.
Here the host writes one plan and one kernel brings it into those buffers; the graph is vLLM's.

All of vLLM's private surface that this needs is in this file, and :func:`lean_step_supported` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger

from nezha_vllm.engine.settings import ServerSettings
from nezha_vllm.engine.step_plan import LeanBatch, whole_prompts, write_plan
from nezha_vllm.kernels.step_inputs import PLAN_FIELDS, StepInputs, fill_step_inputs

logger = init_logger("vllm.nezha")

# Versions whose runner was read line by line for this. What a captured graph reads is no interface: a version that adds
# a buffer would run and answer wrongly, and no check of attributes would notice. tests/test_lean_step.py would.
READ_VERSIONS = ("0.32",)
# Does `build` write anything that a captured graph reads? FlashAttention 3: the schedule of its tiles. Triton: no.
BUILDERS = {"FlashAttentionMetadataBuilder": True, "TritonAttentionMetadataBuilder": False}
RING = 4  # plans that may be in flight; vLLM keeps at most two steps
SPARE_BLOCKS = 1 << 18  # block ids a plan has room for at most: a megabyte


def make_lean_step(runner: Any) -> LeanStep | None:
    """To be called behind the capture of CUDA graphs, on every rank of tensor parallelism.

    None, and a line in the log, where vLLM's own step must do.
    """
    step, why = None, lean_step_supported(runner)
    if why is None:
        try:
            step = LeanStep(runner)
            step.warm_up()
        except Exception as error:  # whatever it is, vLLM's own step still works
            step, why = None, f"{type(error).__name__}: {error}"
    if not _all_ranks(step is not None):
        step, why = None, why or "another rank's steps cannot be lean"
    if step is None:
        logger.info("NEZHA: every step is vLLM's own, lean steps are off: %s", why)
        return None
    logger.info("NEZHA: lean steps for whole prompts of up to %d tokens in all", max(step.metadata))
    return step


def _all_ranks(found: bool) -> bool:
    """Whether it is so on every rank. What a step then is, each sees in the same scheduler's output."""
    from vllm.distributed import get_tp_group

    flag = torch.tensor(found, dtype=torch.int32)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(flag)


class LeanStep:
    def __init__(self, runner: Any) -> None:
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        self.graphs = runner.cudagraph_manager
        self.stage = runner.model_state.draft_stage
        tables, buffers = runner.block_tables, runner.input_buffers
        self.block_size = tables.block_sizes[0]
        self.inputs = StepInputs(
            buffers.input_ids,
            buffers.positions,
            buffers.query_start_loc,
            buffers.seq_lens,
            tables.input_block_tables[0],
            tables.slot_mappings[0],
        )
        # For each captured size what its attention metadata is built from. Like the graph it is padded, and sized for
        # the longest query and context: FlashAttention's schedule must be made for the kernel that was captured.
        self.metadata = {
            desc.num_tokens: _common_metadata(self.inputs, desc, runner.model_state.max_model_len)
            for desc in self.graphs.graphs
            if desc.cg_mode == CUDAGraphMode.FULL and desc.uniform_token_count is None
        }
        builders = [group.get_metadata_builder(0) for group in runner.attn_groups[0]]
        self.builders = [builder for builder in builders if BUILDERS[type(builder).__name__]]
        max_requests, max_blocks = self.inputs.block_table_RW.shape
        words = PLAN_FIELDS * max_requests + max(self.metadata) + min(max_requests * max_blocks, SPARE_BLOCKS)
        plans = [torch.zeros(words, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self.plans: list[tuple[np.ndarray, Tensor]] = [
            (plan.numpy(), get_accelerator_view_from_cpu_tensor(plan)) for plan in plans
        ]
        self._pinned = plans  # owners of the memory behind the views
        self.turn = 0

    def take(self, scheduler_output: Any) -> tuple[LeanBatch, Any] | None:
        """The batch and its captured graph, or None if this step is not for us. Changes nothing."""
        batch = whole_prompts(scheduler_output, self.stage.num_states)
        if batch is None or batch.num_words > len(self.plans[0][0]):
            return None
        graph = self.graphs.dispatch(len(batch.req_ids), batch.num_tokens, None, 0)
        if graph.cg_mode != CUDAGraphMode.FULL or graph.num_tokens not in self.metadata:
            return None
        return batch, graph

    @torch.inference_mode()
    def launch(self, batch: LeanBatch, graph: Any) -> Tensor:
        """Enqueue the forward pass; hidden states [T, H] of the batch's tokens, in order, then padding."""
        self._prepare(batch, graph)
        return self.graphs.run_fullgraph(graph)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernel and try every size's metadata, with a batch of nothing."""
        empty = LeanBatch([], [], [], [], [], 0)
        for graph in self.graphs.graphs:
            if graph.num_tokens in self.metadata:
                self._prepare(empty, graph)
        torch.cuda.synchronize()

    def _prepare(self, batch: LeanBatch, graph: Any) -> None:
        self.turn = (self.turn + 1) % RING
        host, device = self.plans[self.turn]
        write_plan(host, batch)
        fill_step_inputs(
            device,
            self.inputs,
            num_requests=len(batch.req_ids),
            num_tokens=batch.num_tokens,
            padded_requests=graph.num_reqs,
            padded_tokens=graph.num_tokens,
            block_size=self.block_size,
        )
        for builder in self.builders:
            builder.build(0, self.metadata[graph.num_tokens])


def _common_metadata(inputs: StepInputs, desc: Any, max_model_len: int) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    requests, tokens = desc.num_reqs, desc.num_tokens
    return CommonAttentionMetadata(
        query_start_loc=inputs.query_start_R1[: requests + 1],
        query_start_loc_cpu=torch.zeros(requests + 1, dtype=torch.int32),  # the builders above do not look at it
        seq_lens=inputs.seq_lens_R[:requests],
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=max_model_len,
        block_table_tensor=inputs.block_table_RW[:requests],
        slot_mapping=inputs.slot_mapping_T[:tokens],
        causal=True,
    )


def lean_step_supported(runner: Any) -> str | None:
    """Why this runner's steps cannot be lean; None if they can."""
    try:
        return next((why for found, why in _objections(runner) if found), None)
    except (AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        return f"this vLLM differs from the ones it was written for: {type(error).__name__}: {error}"


def _objections(runner: Any) -> Iterator[tuple[Any, str]]:
    """Pairs (does it stand in the way, what it is); a pair may count on the ones before it."""
    from vllm import __version__
    from vllm.utils.platform_utils import is_uva_available
    from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

    config, parallel, state = runner.vllm_config, runner.parallel_config, runner.model_state
    yield not ServerSettings.from_vllm(config).lean_step, "switched off by the option lean_step"
    yield ".".join(__version__.split(".")[:2]) not in READ_VERSIONS, f"vLLM {__version__} is not among those read"
    yield state.draft_stage.graphs is None, "the draft stage is the PyTorch reference"
    yield parallel.data_parallel_size > 1, "data parallel engines agree on every step"
    yield parallel.pipeline_parallel_size > 1, "pipeline parallelism"
    yield parallel.decode_context_parallel_size > 1 or runner.pcp_manager is not None, "context parallelism"
    yield parallel.enable_eplb or runner.ubatch_runner is not None, "expert balancing or microbatches"
    yield runner.model_config.is_moe or runner.is_pooling_model or runner.is_encoder_decoder, "not a dense decoder"
    yield runner.lora_config is not None or runner.speculative_config is not None, "LoRA or speculative decoding"
    yield runner.kv_connector is not NO_OP_KV_CONNECTOR or runner.aux_output_connector is not None, "a connector"
    yield runner.uses_inputs_embeds or runner.encoder_cache is not None, "inputs that are not tokens"
    yield state.rope_state is not None or state.prompt_embeds_state is not None, "positions that are not one number"
    yield runner.fast_prefill is not None or runner.batch_sharder is not None, "fast prefill or sharded sampling"
    yield runner.use_aux_hidden_state_outputs, "auxiliary hidden states"
    yield runner.observability_config.cudagraph_metrics, "statistics of CUDA graphs are on"
    yield not is_uva_available(), "no unified addressing of pinned memory"

    manager = runner.cudagraph_manager
    full = manager is not None and manager.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL and manager.graphs
    yield not full, "no full CUDA graph was captured for prefills"
    names = list(signature(manager.dispatch).parameters)[:4]
    yield names != ["num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"], f"dispatch takes {names}"
    names = list(signature(manager.run_fullgraph).parameters)
    yield names != ["desc"], f"run_fullgraph takes {names}"

    groups, cache = runner.attn_groups, runner.kv_cache_config.kv_cache_groups
    yield len(cache) != 1 or len(groups) != 1, f"{len(cache)} KV cache groups"
    spec = type(cache[0].kv_cache_spec).__name__
    yield spec != "FullAttentionSpec", f"a KV cache of {spec}"
    for group in groups[0]:
        builder = type(group.get_metadata_builder(0))
        yield builder.__name__ not in BUILDERS, f"attention metadata of {builder.__name__}"
        names = list(signature(builder.build).parameters)[:3]
        yield names != ["self", "common_prefix_len", "common_attn_metadata"], f"{builder.__name__}.build takes {names}"
        yield group.kernel_block_size is not None, "attention blocks smaller than cache blocks"
    yield runner.model_config.rswa_window is not None, "reference sliding windows"

    buffers, tables = runner.input_buffers, runner.block_tables
    dtypes = [
        (buffers.input_ids, torch.int32),
        (buffers.positions, torch.int64),
        (buffers.query_start_loc, torch.int32),
        (buffers.seq_lens, torch.int32),
        (tables.input_block_tables[0], torch.int32),
        (tables.slot_mappings[0], torch.int64),
    ]
    yield any(t.dtype != dtype or not t.is_contiguous() for t, dtype in dtypes), "buffers of other types"
    yield len(tables.block_sizes) != 1 or tables.cp_size != 1, "block tables of another layout"
