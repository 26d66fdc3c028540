"""The transformers models: reading positions, padding, packing, folders, and the recommendations they give."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nezha_vllm.config import SOFTMAX_OVER
from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import MODEL_CLASSES, register_models
from nezha_vllm.hf.prompt import prefix_token_ids, prompt_token_ids
from nezha_vllm.hf.random_catalogue import random_catalogue
from nezha_vllm.hf.recommend import pad_left
from nezha_vllm.training.packing import IGNORED, PackedCollator

SIZES = [8, 6, 7]
FAMILIES = ["llama", "qwen3"]


def tiny(family: str, sizes=SIZES):
    torch.manual_seed(0)
    config, tokenizer = scratch_config(tiny_shape(family, hidden_size=64, num_attention_heads=2), list(sizes))
    config.initializer_range = 0.2
    return MODEL_CLASSES[family](config).eval(), tokenizer


def random_codes(count: int, sizes=SIZES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    model, _ = tiny(family)
    prompts = [prompt_token_ids(model.config, random_codes(count, seed=count)) for count in (1, 4, 9)]
    alone = torch.cat([model.hidden_states_for(torch.tensor([prompt])) for prompt in prompts])
    ids, mask = pad_left(prompts)
    lefts = model.hidden_states_for(ids, mask)
    shifts = [int((mask[row] == 0).sum()) for row in range(len(prompts))]
    right_ids = torch.stack([ids[row].roll(-shift) for row, shift in enumerate(shifts)])
    right_mask = torch.stack([mask[row].roll(-shift) for row, shift in enumerate(shifts)])
    rights = model.hidden_states_for(right_ids, right_mask)
    torch.testing.assert_close(lefts, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rights, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_last_history_token_and_the_placeholders(family):
    model, _ = tiny(family)
    ids = torch.tensor([prompt_token_ids(model.config, random_codes(3))])
    every = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.hidden_states_for(ids), every[:, -4:])
    assert ids[0, -3:].tolist() == model.config.placeholder_token_ids


def over_the_items(model, codes: torch.Tensor):
    """The model with a softmax over the catalogue that has these codes."""
    model.config.softmax, model.keys_M = "catalogue", model.config.codec.key(codes).unique()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [(), (3, 1)])
@pytest.mark.parametrize("softmax", SOFTMAX_OVER)
def test_a_packed_row_equals_one_row_per_prefix(family, prefix, softmax):
    model, _ = tiny(family)
    rows = [random_codes(count, seed=count) for count in (7, 5, 2)]
    if softmax == "catalogue":
        over_the_items(model, torch.cat([*rows, random_codes(60)]))
    packed = PackedCollator(model.config, max_history=6, prefix=prefix)(rows)
    assert len(packed["input_ids"]) == 2  # the short ones share a row
    output = model(**packed)
    hidden, losses = [], []
    for codes in rows:
        for used in range(1, len(codes)):
            ids = torch.tensor([prompt_token_ids(model.config, codes[:used], prefix)])
            single = model(ids, labels=codes[None, used])
            hidden.append(single.hidden_states[0, 0])
            losses.append(single.loss)
    labelled = packed["labels"][..., 0] != IGNORED
    torch.testing.assert_close(output.hidden_states[labelled], torch.stack(hidden), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_over_levels_of_level_local_cross_entropy():
    model, _ = tiny("llama")
    codes = random_codes(4)
    ids = torch.tensor([prompt_token_ids(model.config, codes[:3])])
    output = model(ids, labels=codes[None, 3])
    hidden = model.hidden_states_for(ids)
    expected = [
        torch.nn.functional.cross_entropy(scores, codes[3:, level])
        for level, scores in enumerate(model.draft_head(hidden, codes[None, 3]))
    ]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_targets_that_do_not_count_leave_loss_and_gradients_alone(smoothing):
    """With a softmax over the catalogue, in which no item has the codes 0 that they might stand for."""
    rows = [random_codes(count, seed=count) + torch.tensor([1, 0, 0]) for count in (5, 2)]
    model, _ = tiny("llama", [9, *SIZES[1:]])
    over_the_items(model, torch.cat(rows)).label_smoothing = smoothing
    packed, found = PackedCollator(model.config, max_history=6)(rows), []
    assert (packed["labels"] == IGNORED).any()
    for batch in (packed, {name: value for name, value in packed.items() if name != "labelled"}):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss, *(parameter.grad for parameter in model.parameters())))
        assert all(torch.isfinite(value).all() for value in found[-1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_label_smoothing_is_over_the_codes_that_lead_to_an_item():
    model, _ = tiny("llama")
    codes = torch.tensor([[1, 2, 3], [1, 2, 5], [1, 4, 0], [6, 0, 0]])
    over_the_items(model, codes).label_smoothing = 0.2
    ids = torch.tensor([prompt_token_ids(model.config, codes[1:])])
    first, second, third = (scores[0] for scores in model.draft_head(model.hidden_states_for(ids), codes[:1]))
    left = (first[[1, 6]], 0), (second[[2, 4]], 0), (third[[3, 5]], 0)
    expected = [
        torch.nn.functional.cross_entropy(scores[None], torch.tensor([place]), label_smoothing=0.2)
        for scores, place in left
    ]
    torch.testing.assert_close(model(ids, labels=codes[:1]).loss, torch.stack(expected).mean())


def test_a_loss_over_the_catalogue_asks_for_its_keys():
    model, _ = tiny("llama")
    model.config.softmax = "catalogue"
    ids = torch.tensor([prompt_token_ids(model.config, random_codes(3))])
    with pytest.raises(ValueError, match="set the model's keys_M to the catalogue's keys"):
        model(ids, labels=random_codes(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_the_same_through_the_auto_classes(family, tmp_path):
    register_models()
    model, tokenizer = tiny(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.codebook_sizes == SIZES
    ids = torch.tensor([prompt_token_ids(model.config, random_codes(5))])
    torch.testing.assert_close(again.eval().hidden_states_for(ids), model.hidden_states_for(ids), atol=0, rtol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)


def test_tokenizer_gives_one_token_a_code_and_takes_natural_language(tmp_path):
    model, tokenizer = tiny("llama")
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        first, second, third = model.config.code_token_offsets
        assert reader("<a_7> <b_5>\n<c_0>")["input_ids"] == [first + 7, second + 5, third]
        assert reader("<sp_1><sp_2><sp_3>")["input_ids"] == model.config.placeholder_token_ids
        mixed = reader("Ein Käufer sah <a_1><b_1><c_1>, danach")["input_ids"]
        assert [first + 1, second + 1, third + 1] == [token for token in mixed if token >= first]
        assert prefix_token_ids(reader, model.config) == []


def test_recommendations_equal_brute_force_over_the_catalogue():
    model, _ = tiny("llama")
    catalogue = random_catalogue(60, SIZES)
    histories = [["3", "17", "4"], ["59"]]
    answers = model.recommend(histories, 20, catalogue=catalogue, beam_width=60)
    for history, answer in zip(histories, answers, strict=True):
        codes = torch.tensor([catalogue.codes_of(item) for item in history])
        hidden = model.hidden_states_for(torch.tensor([prompt_token_ids(model.config, codes)]))
        every = torch.tensor(catalogue.codes.tolist())
        log_probs = model.draft_head(hidden.expand(len(every), -1, -1), every)
        scores = sum(scores.gather(1, every[:, level, None])[:, 0] for level, scores in enumerate(log_probs))
        order = scores.argsort(descending=True)[:20]
        assert [found.item_id for found in answer] == [catalogue.item_id(int(row)) for row in order]
        torch.testing.assert_close(torch.tensor([found.score for found in answer]), scores[order])


def test_n_counts_items_not_semantic_ids():
    from nezha_vllm.catalogue import Catalogue

    model, _ = tiny("llama")
    catalogue = Catalogue.build(["x", "y", "z"], [[1, 1, 1], [1, 1, 1], [2, 2, 2]], SIZES)
    (answer,) = model.recommend([["x"]], 2, catalogue=catalogue, beam_width=2)
    assert len(answer) == 2
    (all_of_them,) = model.recommend([["x"]], 3, catalogue=catalogue, beam_width=3)
    assert sorted(found.item_id for found in all_of_them) == ["x", "y", "z"]


def test_mistakes_are_named():
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="codebook sizes"):
        model.recommend([["0"]], 1, catalogue=random_catalogue(5, [8, 6, 8]))
    catalogue = random_catalogue(5, SIZES)
    with pytest.raises(ValueError, match="at least one item"):
        model.recommend([[]], 1, catalogue=catalogue)
    with pytest.raises(ValueError, match="beam width"):
        model.recommend([["0"]], 51, catalogue=catalogue)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        model.hidden_states_for(torch.tensor([model.config.placeholder_token_ids]))
    with pytest.raises(ValueError, match="heads of"):
        tiny_shape(hidden_size=100, num_attention_heads=4)
