"""Tokens of semantic IDs: where they stand in prompts, how they are trained, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nezha_vllm.config import NezhaLlamaConfig
from nezha_vllm.hf.modeling import register_models
from nezha_vllm.hf.prompt import prompt_token_ids
from nezha_vllm.item_tokens import KEYS, ItemTokens, load_item_tokens
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.training.item_embeddings import ItemEmbeddings, frequent_keys
from nezha_vllm.training.packing import PackedCollator, packed, shortened

SIZES, OFFSETS, FIRST = (3, 4, 5), (10, 20, 30), 100
CODEC = SemanticIdCodec(SIZES)


def plainly(tokens: list[int], keys: list[int]) -> list[int]:
    """By looking at every three tokens."""
    names = {}
    for number, key in enumerate(keys):
        codes = CODEC.codes_of_key(np.array([key]))[0].tolist()
        names[tuple(code + offset for code, offset in zip(codes, OFFSETS, strict=True))] = FIRST + number
    found = list(tokens)
    for at in range(len(tokens) - 2):
        found[at + 2] = names.get(tuple(tokens[at : at + 3]), found[at + 2])
    return found


def shortly(tokens: list[int], keys: list[int]) -> list[int]:
    """From left to right, what is named is not looked at again."""
    found, at = [], 0
    while at < len(tokens):
        name = plainly(tokens[at : at + 3], keys)[-1]
        whole = name >= FIRST and name != tokens[min(at + 2, len(tokens) - 1)]
        found.append(name if whole else tokens[at])
        at += 3 if whole else 1
    return found


@pytest.mark.parametrize(("short", "expected"), [(False, plainly), (True, shortly)])
@given(
    st.sets(st.integers(0, 59), min_size=1),
    st.lists(st.one_of(st.integers(0, 59), st.sampled_from([5, 10, 11, 21, 33, 50])), max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_last_code_of_a_known_item_gives_way_or_all_wherever_they_stand(
    short: bool, expected: Callable, known: set, parts: list, rng: random.Random
):
    keys = sorted(known)
    items = CODEC.codes_of_key(np.array(parts, np.int64)) + OFFSETS
    pieces = [codes.tolist() if rng.random() < 0.7 else [part] for codes, part in zip(items, parts, strict=True)]
    tokens = [token for piece in pieces for token in piece]
    item_tokens = ItemTokens(np.array(keys), FIRST, CODEC, OFFSETS, short)
    assert item_tokens.in_prompt(tokens) == expected(tokens, keys)
    assert item_tokens.in_prompt(item_tokens.in_prompt(tokens)) == expected(tokens, keys)
    assert item_tokens.history(items).tolist() == expected(items.ravel().tolist(), keys)


def test_the_most_frequent_items_of_the_training_sequences_get_one():
    sequences = [torch.tensor([[0, 0, 1], [2, 3, 4], [0, 0, 1]]), torch.tensor([[1, 0, 0], [2, 3, 4], [0, 0, 1]])]
    key = CODEC.key(np.array([[0, 0, 1], [1, 0, 0], [2, 3, 4]]))
    assert frequent_keys(sequences, CODEC, 2).tolist() == [key[0], key[2]]
    assert frequent_keys(sequences, CODEC, 10).tolist() == key.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tokens") / "tokens", items=60, item_tokens=20)


@pytest.fixture(scope="module")
def model(folder):
    register_models()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_checkpoint_knows_its_item_tokens(folder, model):
    config, stored = model.config, load_file(folder / "model.safetensors")
    assert config.num_item_tokens == len(model.item_tokens) == 20
    assert stored["model.embed_tokens.weight"].shape[0] == config.vocab_size == config.first_item_token + 20
    found = load_item_tokens(folder, config)
    assert found.keys.tolist() == model.item_tokens.keys.tolist() == stored[KEYS].tolist()
    assert found.first == config.first_item_token


def test_they_survive_a_round_trip_in_shards_and_in_half_precision(folder, model, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for found in (again.item_tokens, load_item_tokens(tmp_path, again.config)):
        assert found.keys.tolist() == model.item_tokens.keys.tolist()


def test_a_server_finds_those_of_a_checkpoint_on_a_hub(folder, model, monkeypatch):
    pytest.importorskip("vllm")
    import huggingface_hub

    from nezha_vllm.frontend.service import Service

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    served = SimpleNamespace(model="someone/model", revision=None, hf_config=model.config, max_model_len=64)
    service = Service.load(SimpleNamespace(model_config=served, additional_config=None))
    assert service.item_tokens.keys.tolist() == model.item_tokens.keys.tolist()


def test_an_item_token_is_its_codes_and_a_vector_of_its_own(model):
    """Before and after they become rows of the embeddings like any others."""
    config = NezhaLlamaConfig(**{**model.config.to_dict(), "num_item_tokens": 0})
    config.vocab_size = model.config.first_item_token
    training = type(model)(config).eval()
    keys = model.item_tokens.keys
    training.item_embeddings = table = ItemEmbeddings(config, keys, training.model.embed_tokens)
    weight = training.model.embed_tokens.weight
    codes = torch.from_numpy(config.codec.codes_of_key(keys)) + torch.tensor(config.code_token_offsets)
    ids = torch.arange(config.vocab_size, config.vocab_size + len(keys))[None]
    assert torch.allclose(table(ids)[0], weight[codes].sum(1), atol=1e-5), "its own vector starts at zero"
    table.own.weight.data.normal_()
    assert torch.allclose(table(ids)[0], weight[codes].sum(1) + table.own.weight, atol=1e-5)
    assert torch.equal(table(codes), weight[codes])
    prompt = torch.tensor([prompt_token_ids(config, config.codec.codes_of_key(keys[:4]), (), training.item_tokens)])
    assert (prompt >= config.vocab_size).sum() == 4
    before = training.hidden_states_for(prompt)
    training.settle_item_tokens()
    assert training.item_embeddings is None
    assert training.item_tokens.keys.tolist() == keys.tolist()
    assert torch.allclose(training.hidden_states_for(prompt), before, atol=1e-5)


@pytest.mark.parametrize("hidden_share", [0.0, 1.0])
def test_training_rows_have_them_in_the_history_alone(model, hidden_share):
    config, codes = model.config, torch.from_numpy(model.config.codec.codes_of_key(model.item_tokens.keys[:6]))
    pack = PackedCollator(config, 5, item_tokens=model.item_tokens, item_token_dropout=hidden_share)
    batch = pack([codes])
    last = batch["input_ids"][0, 2:15:3]
    plain = codes[:5, -1] + config.code_token_offsets[-1]
    assert torch.equal(last, plain) == (hidden_share == 1)
    assert (last >= config.first_item_token).all() == (hidden_share == 0)
    assert (batch["input_ids"][0, 15:] < config.first_item_token).all()
    assert batch["labels"][0].tolist() == codes[1:].tolist()


@pytest.mark.parametrize("prefix", [(), (5, 6)])
@pytest.mark.parametrize(("known", "short_rows"), [(20, False), (20, True), (6, False)])
def test_short_histories_train_as_one_row_a_prefix(model, prefix, known, short_rows):
    """Also where some items show all of their codes, between others that do not."""
    codes = torch.from_numpy(model.config.codec.codes_of_key(model.item_tokens.keys[:20]))
    tokens = model.item_tokens
    every = slice(None) if known == 20 else slice(0, 20, 3)
    short = ItemTokens(tokens.keys[every], tokens.first, tokens.codec, tokens.offsets, short=True)
    pieces = [codes[:3], codes[3:8], codes[8:10], codes[10:14], codes[14:20]]
    assert shortened(pieces, short, 0.0) == (known == 20)
    assert not shortened(pieces, short, 0.3)
    pack = PackedCollator(model.config, 5, prefix, item_tokens=short, short_rows=short_rows)
    batch = pack(pieces)
    width = len(prefix) + 5 * (1 if short_rows else 3) + 5 * 3
    assert batch["input_ids"].shape[1] == width
    found = model(**batch).hidden_states.flatten(0, 1)
    rows, first, _ = packed([len(piece) - 1 for piece in pieces], 5)
    expected = {}
    for piece, row, place in zip(pieces, rows, first, strict=True):
        for end in range(1, len(piece)):
            prompt = prompt_token_ids(model.config, piece[:end].numpy(), prefix, short)
            expected[5 * row + place + end - 1] = model.hidden_states_for(torch.tensor([prompt]))[0]
    assert sorted(expected) == batch["labelled"].tolist()
    for position, hidden in expected.items():
        assert torch.allclose(found[position], hidden, atol=1e-4)


def test_the_language_model_never_predicts_them(model):
    config = NezhaLlamaConfig(**{**model.config.to_dict(), "method": "ar"})
    language_model = type(model)(config)
    log_p = language_model.next_token_log_probs(torch.randn(2, config.hidden_size))
    assert log_p.shape == (2, config.first_item_token)


def test_weights_of_another_checkpoint_are_refused(folder, model, tmp_path):
    config = model.config
    weights = load_file(folder / "model.safetensors")
    for keys in (weights[KEYS][:-1], weights[KEYS].flip(0), weights[KEYS] + config.codec.capacity):
        save_file({**weights, KEYS: keys.contiguous()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"not the 20 semantic IDs that config\.json counts"):
            load_item_tokens(tmp_path, config)
    save_file({name: tensor for name, tensor in weights.items() if name != KEYS}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the 20 semantic IDs"):
        load_item_tokens(tmp_path, config)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="not the 20 semantic IDs"):
        load_item_tokens(tmp_path, config)
    written = json.loads((folder / "config.json").read_text())
    for count in (-1, config.vocab_size):
        with pytest.raises(ValueError, match=f"num_item_tokens {count}"):
            NezhaLlamaConfig(**{**written, "num_item_tokens": count}).check()
