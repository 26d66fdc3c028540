"""Shared parts of the tests that start a real vLLM: one small checkpoint, one server process, one offline engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

LEVELS = [16, 24, 32]
BLOCK_SIZE = 32


def make_checkpoint(folder: Path, *, items: int = 600, family: str = "llama", dtype: str = "float32", seed: int = 0) -> Path:
    """A checkpoint with random weights, large enough for scores that are well apart, and items that share IDs."""
    import torch

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.backbones import tiny_shape
    from nezha_vllm.hf.checkpoint import scratch_config, write_checkpoint

    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, items) for size in LEVELS], axis=1)
    codes[1::10] = codes[::10][: len(codes[1::10])]
    catalogue = Catalogue.build(
        [f"item-{i}" for i in range(items)], codes, LEVELS, metadata={"title": [f"Item {i}" for i in range(items)]}
    )
    config, tokenizer = scratch_config(tiny_shape(family, hidden_size=128, num_hidden_layers=2), LEVELS)
    config.initializer_range = 0.15
    write_checkpoint(folder, config, tokenizer, catalogue, dtype=getattr(torch, dtype), seed=seed)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "nezha-tiny")


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a real `vllm serve` process on the checkpoint."""
    from nezha_vllm.server import Server, free_port

    log = tmp_path_factory.mktemp("server") / "log.txt"
    arguments = ["--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", "1024"]
    with Server(checkpoint, free_port(), arguments=arguments, log=log) as running:
        running.wait_until_ready(timeout=240)
        yield running.url
