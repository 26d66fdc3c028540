"""vLLM's scheduler, told that the last L + 1 tokens of a prompt belong together.

Two things could split them: a prefix-cache hit that reaches into them, and a prefill chunk that ends inside them. Both
are prevented through values the scheduler already works with; nothing of it is overridden.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from nezha_vllm.engine.head import end_with_head
from nezha_vllm.engine.parent import end_with_parent
from nezha_vllm.engine.ray_workers import end_with_workers


def make_scheduler(**kwargs: Any) -> Scheduler:
    """Factory for ``SchedulerConfig.scheduler_cls``; vLLM calls it with the scheduler's own keywords."""
    end_with_parent()  # called once in every engine's process
    vllm_config = kwargs["vllm_config"]
    end_with_head(vllm_config)
    end_with_workers(vllm_config)
    levels = vllm_config.model_config.hf_config.num_levels
    scheduler_class = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler = scheduler_class(**kwargs)
    coordinator = scheduler.kv_cache_manager.coordinator
    find_longest_cache_hit = coordinator.find_longest_cache_hit

    def find_before_the_tail(block_hashes: Any, max_cache_hit_length: int) -> Any:
        # vLLM leaves the last token to be computed; we leave L more
        return find_longest_cache_hit(block_hashes, max(0, max_cache_hit_length - levels))

    coordinator.find_longest_cache_hit = find_before_the_tail
    # Workers hear of finished requests with the next one. vLLM would run an empty step to tell them at once,
    # while the answer waits for the interpreter, and with async scheduling sleep 1 ms behind it.
    scheduler.has_finished_requests = lambda: False
    if hasattr(scheduler, "num_prefill_lookahead"):  # vLLM ≥ 0.32; before it the config hook turns chunking off
        scheduler.num_prefill_lookahead = max(scheduler.num_prefill_lookahead, levels + 1)
    return scheduler
