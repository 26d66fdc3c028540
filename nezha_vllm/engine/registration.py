"""Names that make ``vllm serve`` find everything of ours; nothing heavy is imported until a NEZHA model is served."""

from __future__ import annotations

from nezha_vllm.config import ARCHITECTURES, register_configs

TOKENIZER_MODE = "nezha"


def register_with_vllm() -> None:
    """Fill vLLM's registries. Safe to call more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from nezha_vllm.engine.config_hook import NezhaConfigHook

    register_configs()
    for architecture in ARCHITECTURES.values():
        if architecture not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(architecture, f"nezha_vllm.engine.model:{architecture}")
            MODELS_CONFIG_MAP[architecture] = NezhaConfigHook
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(TOKENIZER_MODE, *TokenizerRegistry.tokenizers["hf"])
        RENDERER_REGISTRY.register(TOKENIZER_MODE, "nezha_vllm.frontend.renderer", "NezhaRenderer")
