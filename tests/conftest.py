"""Shared parts of the tests that start a real vLLM: one small checkpoint, one server process, one offline engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from vllm import LLM

    from nezha_vllm.server import Server
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# float32 attention on a GPU is Triton's, which rounds to tf32 otherwise: 1e-3 on scores
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# models this small gain nothing by threads, which wait for each other wherever two processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

# no deadline an example: a machine that runs other things at the same time would break it now and then
settings.register_profile("nezha", deadline=None)
settings.load_profile("nezha")

LEVELS = [16, 24, 32]
BLOCK_SIZE = 32
SERVING = ["--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", "1024"]
PROCESSES = "VLLM_ENABLE_V1_MULTIPROCESSING"
LONGEST = ("parallel", "live", "two_machines", "interpreted", "pipeline", "guarded")
SERVER_ASKED_BY = {f"test_{name}" for name in ("agreement", "bad_input", "http", "metrics", "monitoring", "status")}
SEGMENTS = {"odd": 2, "in stock": 3}  # without every second, every third item
MOVIES = 1682  # items of MovieLens 100K: real histories fit the catalogue


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two workers, as `make test` has, neither is left alone with one of them."""
    places = {f"test_{name}": place - len(LONGEST) for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker, and all files that ask the same server."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "server" if Path(file).stem in SERVER_ASKED_BY else file

    return ByServer(config, log)


def make_checkpoint(
    folder: Path,
    *,
    items: int = MOVIES,
    family: str = "llama",
    dtype: str = "float32",
    seed: int = 0,
    softmax: str = "codes",
    item_tokens: int = 0,
    item_score_weight: float = 0.0,
    short_histories: bool = False,
) -> Path:
    """A checkpoint with random weights, large enough for scores that are well apart, and items that share IDs.

    ``item_tokens``: every other semantic ID has one, that many at most.
    """
    import torch

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.backbones import tiny_shape
    from nezha_vllm.hf.checkpoint import scratch_config, write_checkpoint

    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, items) for size in LEVELS], axis=1)
    codes[1::10] = codes[::10][: len(codes[1::10])]
    names = [f"item-{i}" for i in range(1, items + 1)]
    titles = [name.title() for name in names]
    segments = {name: np.arange(1, items + 1) % step > 0 for name, step in SEGMENTS.items()}
    catalogue = Catalogue.build(names, codes, LEVELS, metadata={"title": titles}, segments=segments)
    config, tokenizer = scratch_config(tiny_shape(family, hidden_size=128, num_hidden_layers=2), LEVELS)
    config.initializer_range, config.softmax = 0.15, softmax
    write_checkpoint(folder, config, tokenizer, catalogue, dtype=getattr(torch, dtype), seed=seed)
    if item_tokens:
        give_item_tokens(folder, catalogue.keys[::2][:item_tokens], item_score_weight, short_histories)
    return folder


def give_item_tokens(
    folder: Path, keys: np.ndarray, item_score_weight: float = 0.0, short_histories: bool = False
) -> None:
    """As training leaves them, with vectors that count for as much as those of the codes."""
    from transformers import AutoModelForCausalLM

    from nezha_vllm.hf.modeling import register_models
    from nezha_vllm.training.item_embeddings import ItemEmbeddings

    register_models()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.item_embeddings = ItemEmbeddings(model.config, keys, model.model.embed_tokens)
    model.item_embeddings.own.weight.data.normal_(std=0.15)
    model.settle_item_tokens()
    model.config.item_score_weight, model.config.short_histories = item_score_weight, short_histories
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that threads cost more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "nezha-tiny")


def start(checkpoint: Path, *, inside: bool = False, **options: object) -> LLM:
    """A real engine, in its own processes or inside this one."""
    from vllm import LLM, envs

    settings = {"dtype": "float32", "enforce_eager": True, "block_size": BLOCK_SIZE, "max_model_len": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROCESSES, str(int(not inside)))
        patch.setenv("VLLM_DIST_IDENT", "")  # what a worker inside puts there is not for later children
        engine = LLM(str(checkpoint), **(settings | options))
    if inside:
        envs.disable_envs_cache()  # which the engine has enabled for the process
    return engine


@contextmanager
def in_process(checkpoint: Path, **options: object) -> Iterator[LLM]:
    """The same without processes of its own: to import vLLM takes each of the two 12 s of CPU. Only where no GPU is."""
    import torch
    from vllm.v1.engine import core

    inside = not torch.cuda.is_available()  # memory of a GPU comes back with the process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM's worker puts another in its place
        engine = start(checkpoint, inside=inside, **options)
    try:
        yield engine
    finally:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "cleanup_dist_env_and_memory", lambda: None)  # other engines of this process go on
            engine.llm_engine.engine_core.shutdown()


@contextmanager
def serving(checkpoint: Path, log: Path, *more: str) -> Iterator[Server]:
    """A real `vllm serve`, whose engine does its worker's work, as on a GPU: a process less for each engine."""
    from nezha_vllm.server import Server, free_port

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROCESSES, "0")
        server = Server(checkpoint, free_port(), arguments=[*SERVING, *more], log=log)
    with server as running:
        yield running


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with in_process(checkpoint) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a real `vllm serve` process on the checkpoint."""
    with serving(checkpoint, tmp_path_factory.mktemp("server") / "log.txt") as running:
        running.wait_until_ready(timeout=240)
        yield running.url
