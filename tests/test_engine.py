"""The engine under vLLM's own optimisations: cache, chunks and batches never change an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from answers import assert_same_answer, of_output
from conftest import BLOCK_SIZE, LEVELS, in_process, make_checkpoint

from nezha_vllm.hf.prompt import history_prompts

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.slow
LENGTHS = range(1, 4 * BLOCK_SIZE + 1)  # one block and three past its boundary
N = 10


def prompt_of(length: int, checkpoint: Path) -> dict[str, list[int]]:
    """Random codes, different from the first token on for every length."""
    offsets = json.loads((checkpoint / "config.json").read_text())["code_token_offsets"]
    rng = np.random.default_rng(length)
    tokens = [offsets[i % 3] + int(rng.integers(0, LEVELS[i % 3])) for i in range(length)]
    return {"prompt_token_ids": tokens}


def ask(llm: LLM, prompts: list[dict[str, list[int]]], n: int = N, **options: object) -> list[RequestOutput]:
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(n=n, extra_args=options or None), use_tqdm=False)


@pytest.fixture(scope="module")
def fresh(llm: LLM, checkpoint: Path) -> list[RequestOutput]:
    llm.reset_prefix_cache()
    outputs = [ask(llm, [prompt_of(length, checkpoint)])[0] for length in LENGTHS]
    assert all(output.num_cached_tokens == 0 for output in outputs)
    return outputs


def test_every_prompt_length_gives_the_same_answer_from_the_cache(
    llm: LLM, fresh: list[RequestOutput], checkpoint: Path
) -> None:
    hits = 0
    for length, expected in zip(LENGTHS, fresh, strict=True):
        cached = ask(llm, [prompt_of(length, checkpoint)])[0]
        assert cached.num_cached_tokens <= length - 1, "a hit reached into the last L + 1 tokens"
        hits += cached.num_cached_tokens > 0
        assert_same_answer(of_output(cached), of_output(expected))
    assert hits >= 3 * BLOCK_SIZE - 1


def test_every_prompt_length_gives_the_same_answer_in_a_batch_of_32(
    llm: LLM, fresh: list[RequestOutput], checkpoint: Path
) -> None:
    llm.reset_prefix_cache()
    for first in range(0, len(LENGTHS), 32):
        batch = LENGTHS[first : first + 32]
        outputs = ask(llm, [prompt_of(length, checkpoint) for length in batch])
        for output, expected in zip(outputs, fresh[first : first + 32], strict=True):
            assert_same_answer(of_output(output), of_output(expected))


def test_every_prompt_length_gives_the_same_answer_in_chunks(fresh: list[RequestOutput], checkpoint: Path) -> None:
    with in_process(checkpoint, max_num_batched_tokens=24, max_num_seqs=8) as chunking:
        for first in range(0, len(LENGTHS), 32):
            batch = LENGTHS[first : first + 32]
            outputs = ask(chunking, [prompt_of(length, checkpoint) for length in batch])
            for output, expected in zip(outputs, fresh[first : first + 32], strict=True):
                assert_same_answer(of_output(output), of_output(expected))


def test_widths_and_validity_modes_mix_in_a_batch(llm: LLM, checkpoint: Path) -> None:
    from vllm import SamplingParams

    options = [(1, "stepwise"), (7, "final"), (64, "stepwise"), (512, "final"), (512, "stepwise"), (3, "stepwise")]
    params = [SamplingParams(n=1, extra_args={"beam_width": width, "validity": mode}) for width, mode in options]
    prompts = [prompt_of(20 + i, checkpoint) for i in range(len(options))]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, param, expected in zip(prompts, params, together, strict=True):
        alone = llm.generate([prompt], param, use_tqdm=False)[0]
        assert_same_answer(of_output(alone), of_output(expected))


def test_final_validity_returns_fewer_items_and_says_why(llm: LLM, checkpoint: Path) -> None:
    output = ask(llm, [prompt_of(30, checkpoint)], n=20, beam_width=20, validity="final")[0]
    assert len(output.outputs) < 20
    assert output.nezha.returned == len(output.outputs)
    assert "catalogue items" in output.nezha.reason


def test_items_that_share_an_id_follow_each_other_in_the_catalogues_order(llm: LLM, checkpoint: Path) -> None:
    from nezha_vllm.catalogue import Catalogue

    catalogue = Catalogue.load(checkpoint / "catalogue")
    output = ask(llm, [prompt_of(9, checkpoint)], n=512, beam_width=512)[0]
    items = [item.text for item in output.outputs]
    assert len(items) == len(set(items)) == 512
    shared = [catalogue.rows_of_index(i) for i in range(catalogue.num_ids) if len(catalogue.rows_of_index(i)) > 1]
    checked = 0
    for rows in shared:
        names = [catalogue.item_id(row) for row in rows]
        if names[-1] in items:
            first = items.index(names[0])
            assert items[first : first + len(names)] == names
            checked += 1
    assert checked > 10


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Path]]:
    """An engine of 400 items, whose softmax is over them, with tokens for half of their semantic IDs."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("small") / "small", items=400, softmax="catalogue", item_tokens=200
    )
    with in_process(folder, max_model_len=64, num_gpu_blocks_override=16) as engine:
        yield engine, folder


PROMPT = {"prompt": "<item:item-3><item:item-17>"}


def test_more_items_than_the_catalogue_has_are_all_of_them(small: tuple[LLM, Path]) -> None:
    output = ask(small[0], [PROMPT], n=512, beam_width=512)[0]
    assert {item.text for item in output.outputs} == {f"item-{i}" for i in range(1, 401)}
    assert output.nezha.reason is not None


def test_a_softmax_over_the_catalogue_is_served_as_the_reference_has_it(small: tuple[LLM, Path]) -> None:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM

    engine, folder = small
    model = NezhaLlamaForCausalLM.from_pretrained(folder).eval()
    catalogue = Catalogue.load(folder / "catalogue")

    def reference(n: int, **options: Any) -> list[tuple[str, float]]:
        [ranking] = model.recommend([["item-3", "item-17"]], n, catalogue=catalogue, **options)
        return [(item.item_id, item.score) for item in ranking]

    wide, narrow, final = {"beam_width": 512}, {"beam_width": 3}, {"beam_width": 512, "validity": "final"}
    whole = of_output(ask(engine, [PROMPT], n=512, **wide)[0])
    assert_same_answer(whole, reference(512, **wide))
    scores_of = {tuple(catalogue.codes_of(item)): score for item, score in whole}
    assert sum(map(math.exp, scores_of.values())) == pytest.approx(1, abs=1e-4)
    left_out = [item for item, _ in whole[::2]]
    [ruled] = ask(engine, [PROMPT], n=512, exclude_items=left_out, **wide)
    assert_same_answer(of_output(ruled), [pair for pair in whole if pair[0] not in left_out])
    assert_same_answer(of_output(ask(engine, [PROMPT], n=3, **narrow)[0]), reference(3, **narrow))
    found = of_output(ask(engine, [PROMPT], n=512, **final)[0])
    assert_same_answer(found, reference(512, **final))
    assert 0 < sum(math.exp(score) for _, score in found) < 0.9


def test_items_with_and_without_tokens_are_served_as_the_reference_has_them(small: tuple[LLM, Path]) -> None:
    from vllm.exceptions import VLLMValidationError

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM

    engine, folder = small
    model, catalogue = NezhaLlamaForCausalLM.from_pretrained(folder).eval(), Catalogue.load(folder / "catalogue")
    history = [f"item-{i}" for i in range(1, 12)]
    codes = np.array([catalogue.codes_of(item) for item in history])
    tokens = codes + model.config.code_token_offsets
    known = model.item_tokens.put(tokens)[:, -1] >= model.config.first_item_token
    assert 2 < known.sum() < 9
    [ranking] = model.recommend([history], 200, catalogue=catalogue, beam_width=512)
    expected = [(item.item_id, item.score) for item in ranking]
    named = {"prompt": "".join(f"<item:{item}>" for item in history)}
    coded = {"prompt_token_ids": tokens.ravel().tolist()}
    for prompt in (named, coded):
        assert_same_answer(of_output(ask(engine, [prompt], n=200, beam_width=512)[0]), expected)
    unseen = of_output(ask(engine, [named], n=200, beam_width=512, exclude_history=True)[0])
    assert not set(history) & {item for item, _ in unseen}
    [output] = ask(engine, [named], n=200, beam_width=512)
    assert output.prompt_token_ids == [*coded["prompt_token_ids"], *model.config.placeholder_token_ids]
    again = {"prompt_token_ids": output.prompt_token_ids}
    assert of_output(ask(engine, [again], n=200, beam_width=512)[0]) == of_output(output)
    with pytest.raises(VLLMValidationError, match="token ids outside"):  # it would hide an item from `exclude_history`
        ask(engine, [{"prompt_token_ids": [model.config.first_item_token]}])


@pytest.mark.parametrize("short", [False, True], ids=["codes in histories", "short histories"])
def test_items_scores_are_served_as_the_reference_has_them(tmp_path: Path, short: bool) -> None:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.modeling import NezhaQwen3ForCausalLM

    options = {"family": "qwen3", "items": 400, "item_tokens": 150, "item_score_weight": 0.5}
    options["short_histories"] = short
    folder = make_checkpoint(tmp_path / "scored", **options)
    model, catalogue = NezhaQwen3ForCausalLM.from_pretrained(folder).eval(), Catalogue.load(folder / "catalogue")
    history = [[f"item-{i}" for i in range(1, 12)], ["item-3", "item-17"]]
    prompts = [{"prompt": "".join(f"<item:{item}>" for item in items)} for items in history]

    def reference(n: int, beam_width: int) -> list[list[tuple[str, float]]]:
        rankings = model.recommend(history, n, catalogue=catalogue, beam_width=beam_width)
        return [[(item.item_id, item.score) for item in ranking] for ranking in rankings]

    with in_process(folder, max_model_len=64, num_gpu_blocks_override=16) as engine:
        for n, beam_width in ((200, 512), (5, 7)):
            outputs = ask(engine, prompts, n=n, beam_width=beam_width)
            for output, expected in zip(outputs, reference(n, beam_width), strict=True):
                assert_same_answer(of_output(output), expected)
    model.config.item_score_weight = 0.0
    without = [[item for item, _ in ranking] for ranking in reference(200, 512)]
    model.config.item_score_weight = 0.5
    assert without != [[item for item, _ in ranking] for ranking in reference(200, 512)]
    with in_process(folder, max_model_len=64, num_gpu_blocks_override=16, load_format="dummy") as engine:
        assert len(of_output(ask(engine, prompts[:1], n=5)[0])) == 5  # whatever became of the weights


def test_short_histories_are_the_same_in_chunks_and_from_the_cache(tmp_path: Path) -> None:
    """Of one item and more, with and without tokens; the caller gets the codes back that it could have sent."""
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM

    folder = make_checkpoint(tmp_path / "short", items=400, item_tokens=150, short_histories=True)
    model, catalogue = NezhaLlamaForCausalLM.from_pretrained(folder).eval(), Catalogue.load(folder / "catalogue")
    rng = np.random.default_rng(0)
    histories = [[f"item-{i}" for i in rng.integers(1, 401, length)] for length in range(1, 3 * BLOCK_SIZE)]
    prompts = [{"prompt": "".join(f"<item:{item}>" for item in items)} for items in histories]
    expected = model.recommend(histories, N, catalogue=catalogue, beam_width=64)
    read = [len(prompt) for prompt in history_prompts(model.config, catalogue, histories, (), model.item_tokens)]
    with in_process(folder, max_model_len=512, num_gpu_blocks_override=400, max_num_batched_tokens=16) as engine:
        hits = 0
        for ask_each in (True, True, False):
            asked = [ask(engine, [prompt], beam_width=64)[0] for prompt in prompts] if ask_each else None
            outputs = asked or ask(engine, prompts, beam_width=64)
            for items, output, ranking, length in zip(histories, outputs, expected, read, strict=True):
                assert_same_answer(of_output(output), [(item.item_id, item.score) for item in ranking])
                assert len(output.prompt_token_ids) == 3 * len(items) + 3 >= length
                assert output.num_cached_tokens <= length - 4
                hits += output.num_cached_tokens > 0
        assert hits > BLOCK_SIZE


def test_offline_beam_search_equals_generate(llm: LLM, checkpoint: Path) -> None:
    from vllm.sampling_params import BeamSearchParams

    prompts = [prompt_of(12, checkpoint), prompt_of(40, checkpoint)]
    beams = llm.beam_search(prompts, BeamSearchParams(beam_width=N, max_tokens=3))
    outputs = ask(llm, prompts, beam_width=N)
    for found, expected in zip(beams, outputs, strict=True):
        assert_same_answer([(s.text, s.cum_logprob) for s in found.sequences], of_output(expected))
        assert found.sequences[0].tokens[-3:] == list(expected.outputs[0].token_ids)


def test_token_ids_that_are_no_integers_are_refused_and_the_engine_lives_on(llm: LLM, checkpoint: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="text or token ids"):
        llm.generate({"prompt_embeds": torch.zeros(4, 128)}, use_tqdm=False)
    for tokens in ([1.5], [None]):
        with pytest.raises(VLLMValidationError, match="no integers"):
            ask(llm, [{"prompt_token_ids": tokens}])  # type: ignore[list-item]
    assert len(ask(llm, [prompt_of(9, checkpoint)])[0].outputs) == N


def test_preempted_requests_get_the_same_answer(llm: LLM, checkpoint: Path) -> None:
    """Eight prompts of four or five blocks each, advancing together in small chunks, on 14 blocks of cache."""
    prompts = [prompt_of(100 + i, checkpoint) for i in range(24)]
    expected = ask(llm, prompts)
    with in_process(
        checkpoint,
        max_model_len=256,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=8,
        max_num_seqs=8,
        num_gpu_blocks_override=14,
        scheduler_reserve_full_isl=False,
        disable_log_stats=False,
    ) as scarce:
        outputs = ask(scarce, prompts)
        preemptions = sum(metric.value for metric in scarce.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preemptions > 0
    for output, other in zip(outputs, expected, strict=True):
        assert_same_answer(of_output(output), of_output(other))


def test_rules_leave_the_best_of_the_eligible_items(llm: LLM, checkpoint: Path) -> None:
    """Against the ranking without rules, filtered afterwards."""
    prompt = {"prompt": "<item:item-3><item:item-70><item:item-12>"}
    [everything] = ask(llm, [prompt], n=512, beam_width=512)
    ranked = of_output(everything)
    best = [item for item, _ in ranked]
    seen = {"prompt": f"<item:{best[0]}><item:{best[3]}>"}
    [full] = ask(llm, [seen], n=512, beam_width=512)
    some, threshold = best[5:90:3], ranked[4][1]
    sold_out = {item for item in best if int(item.removeprefix("item-")) % 3 == 0}
    odd = {item for item in best if int(item.removeprefix("item-")) % 2}
    stock = {"segments": ["in stock"]}
    cases = [
        (prompt, ranked, {"exclude_items": [*best[:30:2], "nobody"]}, lambda item, _: item not in best[:30:2]),
        (prompt, ranked, {"allow_items": some}, lambda item, _: item in some),
        (prompt, ranked, {"allow_items": some, "exclude_items": some[:3]}, lambda item, _: item in some[3:]),
        (prompt, ranked, {"min_score": threshold - 1e-5}, lambda _, score: score >= threshold),
        (prompt, ranked, {"segments": ["odd"]}, lambda item, _: item in odd),
        (
            prompt,
            ranked,
            {"segments": ["odd"], "exclude_segments": ["in stock"]},
            lambda item, _: item in odd & sold_out,
        ),
        (prompt, ranked, stock | {"exclude_items": best[:30:2]}, lambda item, _: item not in {*best[:30:2], *sold_out}),
        (prompt, ranked, stock | {"allow_items": some}, lambda item, _: item in set(some) - sold_out),
        (seen, of_output(full), {"exclude_history": True}, lambda item, _: item not in (best[0], best[3])),
    ]
    for asked, ranking, rules, keep in cases:
        [found] = ask(llm, [asked], n=10, beam_width=100, **rules)
        assert_same_answer(of_output(found), [pair for pair in ranking if keep(*pair)][:10])
        assert found.nezha.unknown_excluded == ("nobody" in rules.get("exclude_items", ()))


def test_a_rule_that_leaves_nothing_says_so(llm: LLM, checkpoint: Path) -> None:
    [found] = ask(llm, [prompt_of(9, checkpoint)], n=5, allow_items=[])
    assert found.outputs == []
    assert "eligible" in found.nezha.reason
