"""Checkpoints of the public NEZHA code: a synthetic one in that format comes out with the same scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nezha_vllm import cli
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.hf.modeling import register_models
from nezha_vllm.hf.prompt import prefix_token_ids
from nezha_vllm.hf.tokenizer import byte_tokenizer

SIZES, HIDDEN = [5, 4, 6], 64
VALID = [0, 3, 17, 17, 60, 111, 119]


@pytest.fixture
def public(tmp_path):
    """What the public code writes: a Llama with added tokens, the head's tensors, the valid set."""
    torch.manual_seed(0)
    folder = tmp_path / "public"
    tokenizer = byte_tokenizer()
    old = len(tokenizer)
    tokens = [f"<{letter}_{code}>" for letter, size in zip("abc", SIZES, strict=True) for code in range(size)]
    tokenizer.add_tokens([AddedToken(token) for token in [*tokens, "<sp_0>", "<sp_1>", "<sp_2>"]])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for level, size in enumerate(SIZES):
        weights[f"mtp_head.token_emb_list.{level}.weight"] = torch.randn(size, HIDDEN)
        weights[f"mtp_head.logit_head_list.{level}.weight"] = torch.randn(size, HIDDEN) / 8
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            shape = (HIDDEN,) if "bias" in name else (HIDDEN, HIDDEN)
            weights[f"mtp_head.transition.{level}.{name}"] = torch.randn(shape) / 8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    stored |= {
        "docid_num": SIZES,
        "offset": [old, old + 5, old + 9],
        "max_sid": 3,
        "old_vocab_size": old,
        "use_mtp": True,
    }
    (folder / "config.json").write_text(json.dumps(stored))
    torch.save(torch.tensor(VALID, dtype=torch.int32), folder / "ava_sid3.pt")
    return folder


def change(folder, **fields):
    path = folder / "config.json"
    stored = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def public_scores(folder, history):
    """log p of every semantic ID [T_1, T_2, T_3] by the equations of the method, from the public tensors alone."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    ids = [config["offset"][level] + code for codes in history for level, code in enumerate(codes)]
    ids += [vocabulary[f"<sp_{level}>"] for level in range(3)]
    backbone = LlamaForCausalLM.from_pretrained(folder).model.eval()
    with torch.no_grad():
        hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -4:]
    total, states = torch.zeros(()), hidden[0]
    for level in range(3):
        logits = (states + hidden[level + 1]) @ weights[f"mtp_head.logit_head_list.{level}.weight"].T
        total = total[..., None] + logits.log_softmax(-1)
        cell = {
            name: weights[f"mtp_head.transition.{level}.{name}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        embedded = weights[f"mtp_head.token_emb_list.{level}.weight"] @ cell["weight_ih"].T + cell["bias_ih"]
        states = torch.tanh(embedded + (states @ cell["weight_hh"].T + cell["bias_hh"])[..., None, :])
    return total


def test_a_converted_checkpoint_gives_the_scores_of_the_public_equations(public, tmp_path):
    out = tmp_path / "ours"
    assert cli.main(["convert", str(public), "--out", str(out)]) == 0
    register_models()
    model, catalogue = AutoModelForCausalLM.from_pretrained(out), Catalogue.load(out / "catalogue")
    # V has level 1 as its least significant digit; 17 is there twice and one item
    items = {str(v): (v % 5, v // 5 % 4, v // 20) for v in VALID}
    assert {item: tuple(catalogue.codes_of(item)) for item in catalogue.items["item_id"].to_pylist()} == items
    histories = [["17"], ["0", "119", "60"]]
    for history, found in zip(histories, model.recommend(histories, 6, catalogue=catalogue), strict=True):
        scores = public_scores(public, [items[item] for item in history])
        expected = sorted(((float(scores[codes]), item) for item, codes in items.items()), reverse=True)
        assert [answer.item_id for answer in found] == [item for _, item in expected]
        assert [answer.score for answer in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<sp_1>", "<sp_2>", "<sp_3>"]) == model.config.placeholder_token_ids
    assert "<sp_0>" not in tokenizer.get_vocab()
    assert prefix_token_ids(tokenizer, model.config) == []


def test_an_index_names_the_items(public, tmp_path, capsys):
    codes = {str(number): [f"<a_{v % 5}>", f"<b_{v // 5 % 4}>", f"<c_{v // 20}>"] for number, v in enumerate(VALID)}
    (tmp_path / "index.json").write_text(json.dumps(codes))
    words = ["convert", str(public), "--index", str(tmp_path / "index.json"), "--index-offset", "1", "--out"]
    assert cli.main([*words, str(tmp_path / "ours")]) == 0
    assert "left out" not in capsys.readouterr().err
    catalogue = Catalogue.load(tmp_path / "ours" / "catalogue")
    assert sorted(catalogue.items["item_id"].to_pylist()) == [str(number) for number in range(1, 8)]
    assert catalogue.codes_of("3") == catalogue.codes_of("4") == [2, 3, 0]
    (tmp_path / "index.json").write_text(json.dumps({item: codes[item] for item in "01"}))
    assert cli.main([*words, str(tmp_path / "fewer")]) == 0
    assert "4 semantic IDs of" in capsys.readouterr().err
    (tmp_path / "index.json").write_text(json.dumps(codes | {"9": ["<a_1>", "<b_0>", "<c_0>"]}))
    assert cli.main([*words, str(tmp_path / "other")]) == 2


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: change(folder, docid_num=None), "has no docid_num: it is no checkpoint of the public NEZHA"),
        (lambda folder: change(folder, use_mtp=False), "use_mtp is False"),
        (lambda folder: change(folder, model_type="opt"), "model_type is 'opt'"),
        (lambda folder: change(folder, docid_num=[5, "4", 6]), "docid_num is [5, '4', 6]"),
        (lambda folder: change(folder, offset=[257]), "offset has 1 entries, docid_num has 3"),
        (lambda folder: change(folder, offset=[257, 263, 266]), "token <b_0> has id 262"),
        (lambda folder: change(folder, docid_num=[5, 4, 7]), "token <c_6> has id None"),
        (lambda folder: change(folder, old_vocab_size=300), "reaches into the 300 tokens"),
        (lambda folder: change(folder, hidden_size=96), "config.json asks for"),
        (lambda folder: (folder / "config.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
        (
            lambda folder: edit_weights(folder, lambda w: w.pop("mtp_head.transition.1.bias_hh")),
            "missing: draft_head.cells.1.bias_hh",
        ),
        (lambda folder: edit_weights(folder, lambda w: w.update(extra=torch.ones(1))), "unknown: extra"),
        (lambda folder: (folder / "ava_sid3.pt").unlink(), "name it with --valid-set"),
        (lambda folder: (folder / "ava_sid3.pt").write_text("x"), "no file of torch.save"),
        (lambda folder: torch.save(torch.tensor([0.5]), folder / "ava_sid3.pt"), "one tensor of integers"),
        (lambda folder: torch.save(torch.tensor([120]), folder / "ava_sid3.pt"), "outside 0 … 119"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(damage, said, public, tmp_path, capsys):
    damage(public)
    assert cli.main(["convert", str(public), "--out", str(tmp_path / "ours")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_what_the_last_level_does_not_use_may_be_absent(public, tmp_path):
    def drop(weights):
        for name in [name for name in weights if ".2." in name and "logit" not in name and name.startswith("mtp")]:
            del weights[name]

    edit_weights(public, drop)
    assert cli.main(["convert", str(public), "--out", str(tmp_path / "ours")]) == 0


def test_pickled_weights_are_read_as_well(public, tmp_path):
    weights = load_file(public / "model.safetensors")
    names = sorted(weights)
    torch.save({name: weights[name] for name in names[:5]}, public / "pytorch_model-00001-of-00002.bin")
    torch.save({name: weights[name] for name in names[5:]}, public / "pytorch_model-00002-of-00002.bin")
    (public / "model.safetensors").unlink()
    assert cli.main(["convert", str(public), "--out", str(tmp_path / "ours")]) == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(ours["model.norm.weight"], weights["model.norm.weight"])
