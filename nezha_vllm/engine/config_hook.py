"""Settings that a NEZHA model needs from vLLM, made once in every process that builds a configuration.

vLLM calls both methods through ``MODELS_CONFIG_MAP`` before it derives anything from the configuration, so the string
slots (worker, scheduler) and switches set here are as if the user had given them. What cannot work is refused here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import TYPE_CHECKING

from packaging.version import Version

from nezha_vllm.engine.cpu_cores import share_cores
from nezha_vllm.engine.settings import ENGINES_HERE, POLL_SECONDS, ServerSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig

logger = logging.getLogger("vllm.nezha")

SUPPORTED = (Version("0.26"), Version("0.34"))
SCHEDULER = "nezha_vllm.engine.scheduler.make_scheduler"
CPU_WORKER = "nezha_vllm.engine.cpu_worker.NezhaCPUWorker"
GPU_WORKER = "nezha_vllm.engine.gpu_worker.NezhaGPUWorker"
MAX_REQUESTS = 256  # requests a step: more only make each of them wait longer
GRAPH_SIZES = (*range(8, 256, 8), *range(256, 512, 16), *range(512, 1024, 64), *range(1024, 4097, 256))  # tokens
SPLITS_OF_VLLM = 32
API_PROCESS = "ApiServer_"  # what vLLM calls each of several API processes
PARENTS_VERSION = "NEZHA_CATALOGUE_VERSION_OF_ENGINES"  # set for child processes, read by API processes alone
SPARE_TOKENS = 1024  # blocks are rounded up, and one is never handed out


class NezhaConfigHook:
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        from nezha_vllm.engine.registration import TOKENIZER_MODE

        check_vllm_version()
        if model_config.tokenizer_mode not in ("auto", "hf", TOKENIZER_MODE):
            raise ValueError(f"--tokenizer-mode {model_config.tokenizer_mode} does not work with NEZHA: leave it out")
        if model_config.skip_tokenizer_init:
            raise ValueError("--skip-tokenizer-init does not work with NEZHA: prompts and answers need the tokenizer")
        model_config.tokenizer_mode = TOKENIZER_MODE
        # sampling defaults of a pretrained backbone (temperature, penalties) mean nothing to a beam search
        model_config.generation_config = "vllm"
        model_config.disable_cascade_attn = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        from vllm.platforms import current_platform

        from nezha_vllm.frontend.install import install
        from nezha_vllm.frontend.service import Service

        refuse_unsupported(vllm_config)
        if current_platform.is_cpu():
            set_cpu_defaults(vllm_config)
        elif current_platform.is_cuda():
            set_gpu_defaults(vllm_config)
            keep_worker_inside(vllm_config)
        parallel = vllm_config.parallel_config
        worker = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
        if parallel.worker_cls not in ("auto", worker):
            raise ValueError(f"--worker-cls {parallel.worker_cls} does not work with NEZHA: leave it out")
        parallel.worker_cls = worker
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(f"--scheduler-cls {scheduler.scheduler_cls} does not work with NEZHA: leave it out")
        scheduler.scheduler_cls = SCHEDULER
        keep_prompt_tail_whole(vllm_config)
        if multiprocessing.current_process().name.startswith(API_PROCESS):
            pin_catalogue(vllm_config, os.environ.get(PARENTS_VERSION))
        version = Service.load(vllm_config).catalogue.version
        pin_catalogue(vllm_config, version)
        os.environ[PARENTS_VERSION] = version
        os.environ[ENGINES_HERE] = str(parallel.data_parallel_size_local)
        install()


def pin_catalogue(vllm_config: VllmConfig, version: str | None) -> None:
    """Let whatever reads the catalogue for this configuration start with ``version``; the user's own pin stays.

    Engines receive the configuration. Of several API processes each makes it anew, and would read another version than
    the engines if one was published meanwhile: they hear of the engines' version through the environment.
    """
    additional = dict(vllm_config.additional_config or {})
    options = additional.get("nezha", {})
    if version is not None and isinstance(options, dict) and options.get("catalogue_version") is None:
        poll = options.get("catalogue_poll_seconds", POLL_SECONDS)  # it is not the user who pins
        pinned = {**options, "catalogue_version": version, "catalogue_poll_seconds": poll}
        vllm_config.additional_config = {**additional, "nezha": pinned}


def check_vllm_version() -> None:
    """Raise ``ValueError`` outside the range the plugin was tested with."""
    import vllm

    version = Version(vllm.__version__)
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise ValueError(
            f"nezha-vllm works with vLLM {SUPPORTED[0]} to {SUPPORTED[1]} (exclusive), this is {version}: "
            'install a supported one, for example `pip install "vllm==0.32.0"`'
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` naming the flag of a vLLM feature that cannot work with one prefill and no decoding."""
    model = vllm_config.model_config
    refusals = [
        (model.runner_type != "generate", "--runner pooling: NEZHA answers completions, leave the flag out"),
        (vllm_config.speculative_config, "--speculative-config: NEZHA has no decode steps to speculate on, remove it"),
        (vllm_config.kv_transfer_config, "--kv-transfer-config: external cache hits may cover placeholders, remove it"),
        (vllm_config.cache_config.kv_offloading_size,  # becomes a KV connector after this hook
         "--kv-offloading-size: external cache hits may cover placeholders, remove it"),
        (getattr(model, "enable_sleep_mode", False),
         "--enable-sleep-mode: the draft head's tables would not come back after it, remove it"),
        (getattr(vllm_config, "weight_transfer_config", None),
         "--weight-transfer-config: the draft head's tables are made once, when weights are loaded, remove it"),
        (vllm_config.lora_config, "--enable-lora: the draft head belongs to one set of weights, remove it"),
        (model.override_generation_config,
         "--override-generation-config: items are ranked and not sampled, remove it"),
        (getattr(model, "enable_prompt_embeds", False), "--enable-prompt-embeds: prompts are tokens here, remove it"),
        (os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
         "VLLM_USE_RUST_FRONTEND: the Rust front end cannot return items, unset it"),
        (vllm_config.parallel_config.pipeline_parallel_size > 1,
         "--pipeline-parallel-size: use --tensor-parallel-size or --data-parallel-size instead"),
        (vllm_config.parallel_config.prefill_context_parallel_size > 1,
         "--prefill-context-parallel-size: it splits the end of a prompt over ranks, use --tensor-parallel-size"),
    ]  # fmt: skip
    for found, message in refusals:
        if found:
            raise ValueError(f"not supported with a NEZHA model: {message}")


def set_cpu_defaults(vllm_config: VllmConfig) -> None:
    """Where the user has set nothing: no compilation, cores for every worker, and no more cache than is needed.

    That is what the longest prompt takes, and 1 GiB at least.
    """
    from vllm.config import CacheConfig

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    share_cores(parallel.data_parallel_size_local, parallel.local_world_size)
    if vllm_config.compilation_config.mode is None:
        # measured on 2 cores: torch.compile adds 30 s to the start and nothing to a request (9.9 against 9.1 ms)
        model.enforce_eager = True
    untouched = cache.gpu_memory_utilization == CacheConfig.gpu_memory_utilization
    if untouched and cache.kv_cache_memory_bytes is None:
        # vLLM would take 92 % of the memory, and refuse to start where other programs use 8 %
        values_a_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
        longest = (model.max_model_len + SPARE_TOKENS) * values_a_token * model.dtype.itemsize
        cache.kv_cache_memory_bytes = max(1 << 30, longest)


def set_gpu_defaults(vllm_config: VllmConfig) -> None:
    """Whole prefills as CUDA graphs, where the user has set nothing. Asynchronous scheduling stays vLLM's choice.

    With it a request alone takes up to 0.5 ms longer beside a fast host, but beside a slow one a saturated GPU is busy
    for 0.84 to 0.9 of the time instead of 0.6 to 0.7, with 12 to 26 % more requests/s (docs/performance.md).
    ``max_num_seqs`` is capped: whether the user or vLLM has set it cannot be told.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    if scheduler.max_num_seqs > MAX_REQUESTS:
        logger.info("NEZHA: max_num_seqs %d becomes %d", scheduler.max_num_seqs, MAX_REQUESTS)
        scheduler.max_num_seqs = MAX_REQUESTS
    # FlashAttention 3, which is for 16 bits, can be captured whatever the lengths; elsewhere vLLM would turn full
    # graphs off for prefills, and with float32's attention Model Runner V1 ends in an illegal memory access
    model = vllm_config.model_config
    hopper = current_platform.is_device_capability(90) and model.dtype.itemsize == 2
    optimised = getattr(vllm_config, "optimization_level", 2) != 0
    graphs = hopper and optimised and compilation.cudagraph_mode is None and not model.enforce_eager
    # Model Runner V1 captures as if a request had all of a step's tokens, and would read blocks behind its table
    v1 = graphs and not vllm_config.use_v2_model_runner
    if graphs and not (v1 and max(compilation.cudagraph_capture_sizes or [0]) > model.max_model_len):
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        keep_steps_in_graphs(scheduler, model.max_model_len)
        if compilation.cudagraph_capture_sizes is None:
            # a step of more tokens than all requests can have together does not exist, and cannot be captured
            most = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * model.max_model_len)
            largest = compilation.max_cudagraph_capture_size
            if v1:
                most = min(most, model.max_model_len)
                largest = GRAPH_SIZES[-1] if largest is None else largest
            if largest is not None:  # vLLM refuses to start unless the largest size is it
                compilation.max_cudagraph_capture_size = largest = min(most, largest)
            compilation.cudagraph_capture_sizes = graph_sizes(most, largest)
        attention = vllm_config.attention_config
        if attention.flash_attn_max_num_splits_for_cuda_graph == SPLITS_OF_VLLM:
            # a prefill fills the GPU without splitting its context, and saves the kernels that combine the parts
            attention.flash_attn_max_num_splits_for_cuda_graph = 1


def keep_worker_inside(vllm_config: VllmConfig) -> None:
    """Several engines of one worker each work as a single engine does, without a process more for the worker.

    vLLM counts all engines' GPUs when it decides, so that each step of theirs crosses shared memory twice, though they
    have nothing to tell each other. Whether the user has asked for that cannot be told: ``worker_process`` does.
    """
    parallel = vllm_config.parallel_config
    one_each = parallel.data_parallel_size > 1 and parallel.world_size == 1 and parallel.data_parallel_backend == "mp"
    if not one_each or parallel.distributed_executor_backend != "mp":
        return
    if not ServerSettings.from_vllm(vllm_config).worker_process:
        parallel.distributed_executor_backend = "uni"


def keep_steps_in_graphs(scheduler: SchedulerConfig, longest_prompt: int) -> None:
    """No step of more tokens than the largest graph, no prompt cut in two, where every prompt fits such a step.

    Both leave lean steps for vLLM's own. Measured on an H100, Qwen3-0.6B shapes, 303 tokens, K = 512, 32 clients:
    536 requests/s without, 1,042 with it. On Model Runner V1 graphs end at the longest prompt: larger steps have none.
    """
    most = min(scheduler.max_num_batched_tokens, GRAPH_SIZES[-1])
    if longest_prompt <= most:
        scheduler.max_num_batched_tokens = most
        scheduler.enable_chunked_prefill = False


def graph_sizes(most_tokens: int, largest: int | None) -> list[int] | None:
    """Sizes to capture up to a step's most tokens; ``largest`` is the user's maximum, which vLLM wants among them."""
    most = most_tokens if largest is None else min(most_tokens, largest)
    sizes = [size for size in GRAPH_SIZES if size <= most]
    if largest is not None and largest <= most_tokens and largest not in sizes:
        sizes.append(largest)
    return sizes or None


def keep_prompt_tail_whole(vllm_config: VllmConfig) -> None:
    """Make sure the last L + 1 tokens of a prompt can be, and are, computed in one step."""
    tail = vllm_config.model_config.hf_config.num_levels + 1
    scheduler = vllm_config.scheduler_config
    limits = {
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold or tail,
        "--max-model-len": vllm_config.model_config.max_model_len - 1,
    }
    for flag, limit in limits.items():
        if limit < tail:
            raise ValueError(f"{flag} is too small: the {tail} last tokens of a prompt are computed in one step")
    if not hasattr(type(vllm_config), "num_prefill_lookahead_tokens"):  # vLLM < 0.32 cannot reserve a prompt's tail
        scheduler.enable_chunked_prefill = False
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, vllm_config.model_config.max_model_len)
