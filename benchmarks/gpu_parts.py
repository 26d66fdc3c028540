"""What each GPU kernel of a request belongs to, and the least that each part can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import floors
from benchmarks.floors import Work

LINEAR, ATTENTION, CACHE, NORMS = "linear layers", "attention", "cache write", "norms, activations, rotary"
INPUTS, COPIES, GATHER, OTHER = "input kernel", "copies", "gather of states", "other"
PARTS = (INPUTS, LINEAR, ATTENTION, CACHE, NORMS, GATHER, COPIES, OTHER)
DRAFT = ("request_products", "score_children", "select_beams", "context_states", "beam_products")
DRAFT += ("item_products", "rank_items")

# first that fits: FlashAttention's kernels have "cutlass" in their names, and what writes its cache has "flash"
RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fill_step_inputs",), INPUTS),
    (("reshape_and_cache",), CACHE),
    (("flash", "fmha", "attention", "attn"), ATTENTION),
    (("memcpy", "memset"), COPIES),
    (("nvjet", "gemm", "cutlass", "cublas", "gemv", "xmma", "splitk"), LINEAR),
    (("triton_", "norm", "act_and_mul", "rotary", "silu", "elementwise"), NORMS),
    (("index", "gather"), GATHER),
)


@dataclass(frozen=True)
class Kernel:
    """``start`` and ``us`` in microseconds; ``own`` is what is left of ``us`` behind the kernels before it.

    Overlapping launches begin early and wait, so the sum of ``us`` counts time twice; that of ``own`` does not.
    """

    name: str
    start: float
    us: float
    own: float
    part: str


def sort_kernels(events: Sequence[tuple[str, float, float]]) -> list[Kernel]:
    """Kernels (name, start, µs) of one request, in any order, each with its part."""
    kernels, end, drafting = [], float("-inf"), False
    for name, start, us in sorted(events, key=lambda event: event[1]):
        part = _part(name)
        drafting |= part == "draft: request_products"
        if drafting and part == LINEAR:  # wide searches multiply by cuBLAS
            part = "draft: beam_products"
        own = max(0.0, start + us - max(start, end))
        end = max(end, start + us)
        kernels.append(Kernel(name, start, us, own, part))
    return kernels


def _part(name: str) -> str:
    if ours := next((part for part in DRAFT if part in name), None):
        return f"draft: {ours}"
    lower = name.lower()
    return next((part for words, part in RULES if any(word in lower for word in words)), OTHER)


def backbone_work(config: Any, tokens: int, number_bytes: int = 2) -> dict[str, Work]:
    """Work of a backbone's parts for one prompt of ``tokens``; ``config`` has the fields of a Llama's configuration.

    Linear layers read each weight once; attention is causal; norms, activations and rotary embeddings read and write
    what they must if nothing of it is fused into a matrix product. The output layer is never run.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * size, kv_heads * size
    weights = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    moved = 8 * hidden + 2 * (queries + keys) + 3 * inner  # two norms with a residual, rotary, SiLU times gate
    numbers = tokens * number_bytes
    return {
        LINEAR: Work(layers * weights * number_bytes, 2 * layers * weights * tokens),
        ATTENTION: Work(layers * numbers * (2 * queries + 2 * keys), 2 * layers * queries * tokens * (tokens + 1)),
        CACHE: Work(layers * numbers * 4 * keys),
        NORMS: Work(layers * numbers * moved),
    }


def draft_work(search: floors.Search, plan: Any, bucket: int) -> dict[str, Work]:
    """Work of the draft stage's kernels, all levels together."""
    found: dict[str, Work] = {"draft: request_products": floors.request_products(search)}

    def add(part: str, work: Work) -> None:
        found[f"draft: {part}"] = found.get(f"draft: {part}", Work(0)) + work

    for level in range(len(search.sizes)):
        shape = plan.geometry(level, bucket)
        add("score_children", floors.score_children(search, level, plan.levels[level].table is not None))
        add("select_beams", floors.select_beams(search, level, shape.groups, shape.fan))
        if level:
            add("beam_products", floors.beam_products(search, level))
        if level < search.last:
            add("context_states", floors.context_states(search, level))
    if search.with_token is not None:
        add("item_products", floors.item_products(search))
        add("rank_items", floors.rank_items(search))
    return found
