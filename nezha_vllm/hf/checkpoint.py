"""One checkpoint folder: configuration, weights, tokenizer and catalogue, made complete or not at all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from nezha_vllm.config import ARCHITECTURES, CONFIG_CLASSES, NezhaConfig
from nezha_vllm.folders import replacing
from nezha_vllm.hf.modeling import MODEL_CLASSES
from nezha_vllm.hf.streamed import write_safetensors
from nezha_vllm.hf.tokenizer import add_semantic_ids, byte_tokenizer

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue

MOST_THREADS = 16  # each holds a tensor, of 2 GB at most in an 8B model

Track = Callable[[Sequence[str]], Iterable[str]]


def scratch_config(shape: dict[str, Any], codebook_sizes: list[int]) -> tuple[NezhaConfig, PreTrainedTokenizerBase]:
    """Configuration and byte tokenizer for a backbone from ``backbones``; its vocabulary grows by the added tokens."""
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    layout = add_semantic_ids(tokenizer, codebook_sizes)
    fields = {name: value for name, value in shape.items() if name not in ("family", "vocab_size")}
    config = CONFIG_CLASSES[shape["family"]](
        **fields,
        vocab_size=max(len(tokenizer), shape["vocab_size"] + len(tokenizer) - before),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        codebook_sizes=list(codebook_sizes),
        code_token_offsets=layout.code_token_offsets,
        placeholder_token_ids=layout.placeholder_token_ids,
        architectures=[ARCHITECTURES[shape["family"]]],
    )
    config.check()
    return config, tokenizer


def grown_config(folder: str, codebook_sizes: list[int]) -> tuple[NezhaConfig, PreTrainedTokenizerBase, int]:
    """Configuration and tokenizer of a local Hugging Face checkpoint with the semantic IDs added.

    Returns also the size of the tokenizer before. Raises ``ValueError`` for another architecture.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"no Hugging Face checkpoint at {folder}: it has no config.json")
    base = AutoConfig.from_pretrained(folder)
    if base.model_type not in CONFIG_CLASSES:
        raise ValueError(
            f"{folder} is a {base.model_type!r} model; NEZHA runs on the architectures {sorted(CONFIG_CLASSES)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    layout = add_semantic_ids(tokenizer, codebook_sizes)
    fields = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    fields |= {
        "vocab_size": max(base.vocab_size, len(tokenizer)),
        "tie_word_embeddings": True,
        "codebook_sizes": list(codebook_sizes),
        "code_token_offsets": layout.code_token_offsets,
        "placeholder_token_ids": layout.placeholder_token_ids,
        "architectures": [ARCHITECTURES[base.model_type]],
    }
    config = CONFIG_CLASSES[base.model_type](**fields)
    config.check()
    return config, tokenizer, before


def grown_weights(folder: str, config: NezhaConfig, first_new_token: int) -> dict[str, Tensor]:
    """The backbone's weights under ``model.*``, its embeddings grown.

    New tokens start at the mean of the old ones plus a little noise, so that they are tokens like others, yet differ.
    """
    backbone = AutoModel.from_pretrained(folder, dtype="auto")
    weights = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    old = weights["model.embed_tokens.weight"]
    rows = min(first_new_token, len(old))
    mean, spread = old[:rows].float().mean(0), old[:rows].float().std()
    grown = torch.empty(config.vocab_size, old.shape[1], dtype=old.dtype)
    grown[: len(old)] = old
    new = torch.randn(config.vocab_size - rows, old.shape[1], generator=torch.Generator().manual_seed(0))
    grown[rows:] = (mean + 0.1 * spread * new).to(old.dtype)
    weights["model.embed_tokens.weight"] = grown
    return weights


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: NezhaConfig,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    *,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    track: Track = iter,
) -> None:
    """Write the folder; tensors that ``weights`` lacks are random, with the scale a fresh model would have."""
    weights = weights or {}
    with torch.device("meta"):
        family = next(name for name, config_class in CONFIG_CLASSES.items() if isinstance(config, config_class))
        shapes = {name: tuple(value.shape) for name, value in MODEL_CLASSES[family](config).state_dict().items()}

    def make(name: str) -> Tensor:
        if name in weights:
            return weights[name]
        # a stream of its own for each, so that threads make them; NumPy's, which takes a third of the time of torch's
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return _random(name, shapes[name], config, dtype, generator)

    config.dtype = dtype
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with replacing(folder, "config.json") as scratch:
        write_safetensors(scratch / "model.safetensors", shapes, dtype, make, track, threads)
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        catalogue.save(scratch / config.catalogue)


def _random(
    name: str, shape: tuple[int, ...], config: NezhaConfig, dtype: torch.dtype, generator: np.random.Generator
) -> Tensor:
    if "norm" in name.split(".")[-2]:
        return torch.ones(shape, dtype=dtype)
    if ".cells." in name:
        bound = config.hidden_size**-0.5
        values = generator.random(shape, dtype=np.float32) * (2 * bound) - bound
    else:
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(config.initializer_range)
    return torch.from_numpy(values).to(dtype)
