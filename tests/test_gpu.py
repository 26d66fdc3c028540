"""Both model runners on an NVIDIA GPU: the answers of the transformers reference, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from answers import assert_same_answer, of_output
from conftest import MOVIES, make_checkpoint, start
from test_engine import LENGTHS, N, ask, prompt_of

if TYPE_CHECKING:
    from vllm import RequestOutput

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def answers(checkpoint: Path, v1: bool = False, **options: object) -> list[RequestOutput]:
    """Every prompt length alone, then all of them in batches of 32. ``v1``: which model runner it must be."""
    engine = start(checkpoint, **({"enable_prefix_caching": False, "gpu_memory_utilization": 0.2} | options))
    assert (engine.collective_rpc("lean_steps") == [None]) == v1
    prompts = [prompt_of(length, checkpoint) for length in LENGTHS]
    alone = [ask(engine, [prompt])[0] for prompt in prompts]
    batched = [output for first in range(0, len(prompts), 32) for output in ask(engine, prompts[first : first + 32])]
    engine.llm_engine.engine_core.shutdown()
    return alone + batched


def reference(checkpoint: Path) -> list[list[tuple[str, float]]]:
    """The same prompts through the transformers model in float32."""
    import torch

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.draft_head import reference_beam_search
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM

    model = NezhaLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().cuda()
    catalogue = Catalogue.load(checkpoint / "catalogue")
    keys = torch.from_numpy(catalogue.keys.copy()).cuda()
    rankings = []
    for length in LENGTHS:
        tokens = prompt_of(length, checkpoint)["prompt_token_ids"]
        tokens = model.item_tokens.in_prompt(tokens) if model.item_tokens else tokens
        ids = torch.tensor([[*tokens, *model.config.placeholder_token_ids]], device="cuda")
        hidden = model.hidden_states_for(ids, torch.ones_like(ids))
        widths, stepwise = torch.tensor([50], device="cuda"), torch.tensor([True], device="cuda")
        beams = reference_beam_search(model.draft_head, hidden, keys, widths, stepwise, item_scores=model.item_scores)
        found = zip(beams.index_NK[0].tolist(), beams.scores_NK[0].tolist(), strict=True)
        rows = [(row, score) for index, score in found if index >= 0 for row in catalogue.rows_of_index(index)]
        rankings.append([(catalogue.item_id(row), score) for row, score in rows[:N]])
    return rankings * 2


def overlap(found: Sequence[tuple[str, float]], expected: Sequence[tuple[str, float]]) -> float:
    return len({item for item, _ in found} & {item for item, _ in expected}) / len(expected)


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> list[RequestOutput]:
    return answers(checkpoint, dtype="bfloat16")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[tuple[str, float]]]:
    return reference(checkpoint)


@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": False}, {"compilation_config": {"cudagraph_mode": "FULL"}}],
    ids=["default", "sync", "full"],
)
def test_graphs_do_not_change_bfloat16_answers(
    checkpoint: Path,
    options: dict[str, object],
    eager: list[RequestOutput],
    expected: list[list[tuple[str, float]]],
) -> None:
    """Heads of 32: where a graph captured for one-token queries loses its causal mask without a word."""
    graphs = answers(checkpoint, dtype="bfloat16", enforce_eager=False, **options)
    agreement = [overlap(of_output(found), of_output(other)) for found, other in zip(graphs, eager, strict=True)]
    against_float32 = [overlap(of_output(found), other) for found, other in zip(graphs, expected, strict=True)]
    for name, shares in (("eager bfloat16", agreement), ("float32", against_float32)):
        print(f"\ngraphs share {sum(shares) / len(shares):.3f} of the top {N} with {name}, minimum {min(shares):.1f}")
    assert sum(agreement) / len(agreement) > 0.95
    assert sum(against_float32) / len(against_float32) > 0.9
    for found, other in zip(graphs, eager, strict=True):
        assert abs(of_output(found)[0][1] - of_output(other)[0][1]) < 0.1


CHUNKS_AND_CACHE = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_prefix_caching": True}


@pytest.mark.parametrize("options", [{}, CHUNKS_AND_CACHE], ids=["whole", "chunks and cache"])
def test_float32_equals_the_reference(
    checkpoint: Path,
    options: dict[str, object],
    expected: list[list[tuple[str, float]]],
) -> None:
    outputs = answers(checkpoint, dtype="float32", **options)
    assert any(output.num_cached_tokens for output in outputs) == bool(options)
    for output, ranking in zip(outputs, expected, strict=True):
        assert_same_answer(of_output(output), ranking)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of its semantic IDs have tokens; the others' scores are of their codes."""
    folder = tmp_path_factory.mktemp("scored") / "scored"
    return make_checkpoint(folder, item_tokens=MOVIES, item_score_weight=0.3)


def test_item_scores_equal_the_reference(scored: Path) -> None:
    expected = reference(scored)
    for output, ranking in zip(answers(scored, dtype="float32"), expected, strict=True):
        assert_same_answer(of_output(output), ranking)
    graphs = answers(scored, dtype="bfloat16", enforce_eager=False)
    shares = [overlap(of_output(output), ranking) for output, ranking in zip(graphs, expected, strict=True)]
    print(f"\nwith item scores, graphs in bfloat16 share {sum(shares) / len(shares):.3f} of the top {N} with float32")
    assert sum(shares) / len(shares) > 0.9


@pytest.mark.parametrize(
    ("dtype", "eager"),
    [("float32", True), ("float32", False), ("bfloat16", False)],
    ids=["eager", "graphs", "bfloat16"],
)
def test_model_runner_v1_equals_the_reference(
    checkpoint: Path, expected: list[list[tuple[str, float]]], monkeypatch: pytest.MonkeyPatch, dtype: str, eager: bool
) -> None:
    """vLLM takes it where it is told to, and 0.26 wherever any package brings a logits processor."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    outputs = answers(checkpoint, v1=True, dtype=dtype, enforce_eager=eager)
    if dtype == "float32":
        for output, ranking in zip(outputs, expected, strict=True):
            assert_same_answer(of_output(output), ranking)
        return
    shares = [overlap(of_output(output), ranking) for output, ranking in zip(outputs, expected, strict=True)]
    print(f"\nModel Runner V1 in bfloat16 shares {sum(shares) / len(shares):.3f} of the top {N} with float32")
    assert sum(shares) / len(shares) > 0.9
