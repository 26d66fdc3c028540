"""Published shapes of the backbones that NEZHA is measured on, for checkpoints with random weights."""

from __future__ import annotations

from typing import Any

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_2 = {
    "family": "llama",
    "vocab_size": 128256,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA_3_ROPE,
}
QWEN3 = {
    "family": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}

# family: key of config.CONFIG_CLASSES; the rest are fields of the backbone's own configuration
BACKBONES: dict[str, dict[str, Any]] = {
    "llama-1b": {**LLAMA_3_2, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama-3b": {
        **LLAMA_3_2,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
    "llama-8b": {
        **LLAMA_3_2,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "intermediate_size": 14336,
        "rope_parameters": {**LLAMA_3_ROPE, "factor": 8.0},
    },
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}

SERVED_HEAD_DIMS = (32, 64, 96, 128)


def tiny_shape(
    family: str = "llama",
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 2048,
) -> dict[str, Any]:
    """A small backbone for training from scratch. Raises ``ValueError`` for shapes that vLLM's attention refuses."""
    head_dim, rest = divmod(hidden_size, num_attention_heads)
    if rest or head_dim not in SERVED_HEAD_DIMS:
        raise ValueError(
            f"hidden size {hidden_size} over {num_attention_heads} heads gives heads of "
            f"{hidden_size / num_attention_heads:g}; choose them so that a head has one of {SERVED_HEAD_DIMS}"
        )
    return {
        "family": family,
        "vocab_size": 0,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size or 4 * hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
