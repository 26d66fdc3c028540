"""`nezha init`: checkpoints with random weights, and checkpoints grown from a local Hugging Face folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.cli import main
from nezha_vllm.hf.backbones import BACKBONES
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import register_models
from nezha_vllm.hf.prompt import prefix_token_ids
from nezha_vllm.hf.random_catalogue import random_catalogue
from nezha_vllm.hf.streamed import write_safetensors

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 40,
}


@pytest.fixture
def local_checkpoint(tmp_path):
    """A small public-style checkpoint; its tokenizer puts <s> in front of every text."""

    def make(family):
        folder = tmp_path / family
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        model.save_pretrained(folder)
        words = {word: index for index, word in enumerate(["<s>", "<unk>", "the", "movie", "was", "good"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
        return folder, model

    return make


def test_random_weights_make_a_checkpoint_that_recommends(tmp_path):
    out = tmp_path / "small"
    command = ["init", "--backbone", "tiny", "--random-weights", "--hidden", "64", "--heads", "2", "--dtype", "float32"]
    assert main([*command, "--random-items", "200", "--codes", "16", str(out)]) == 0
    register_models()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    catalogue = Catalogue.load(out / "catalogue")
    assert catalogue.num_items == 200
    (answer,) = model.recommend([["5", "6"]], 10, catalogue=catalogue)
    assert len({found.item_id for found in answer}) == 10
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_local_checkpoint_keeps_weights_and_token_ids(family, local_checkpoint, tmp_path):
    folder, original = local_checkpoint(family)
    random_catalogue(50, [8, 8, 8]).save(tmp_path / "catalogue")
    out = tmp_path / "nezha"
    command = ["init", "--backbone", str(folder), "--catalogue", str(tmp_path / "catalogue"), "--dtype", "float32"]
    assert main([*command, str(out)]) == 0
    weights = load_file(out / "model.safetensors")
    for name, value in original.model.state_dict().items():
        kept = weights[f"model.{name}"]
        # rows past the old tokenizer's end had no token and now belong to the new ones
        assert torch.equal(
            kept[:6] if "embed_tokens" in name else kept, value[:6] if "embed_tokens" in name else value
        ), name
    assert not [name for name in weights if not name.startswith(("model.", "draft_head."))]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    assert after("the movie was good")["input_ids"] == before("the movie was good")["input_ids"]
    register_models()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert prefix_token_ids(after, model.config) == [0]
    assert after("<a_3>")["input_ids"] == [0, model.config.code_token_offsets[0] + 3]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


@pytest.mark.parametrize("name", BACKBONES)
def test_published_shapes_have_the_published_size(name):
    config, _ = scratch_config(BACKBONES[name], [512, 512, 512])
    assert config.vocab_size == BACKBONES[name]["vocab_size"] + 3 * 512 + 3
    with torch.device("meta"):
        backbone = config.__class__.__bases__[-1]
        from transformers import AutoModelForCausalLM as Auto

        model = Auto.from_config(backbone(**{**config.to_dict(), "vocab_size": BACKBONES[name]["vocab_size"]}))
    published = {"llama-1b": 1.236e9, "llama-3b": 3.213e9, "qwen3-0.6b": 0.596e9, "qwen3-1.7b": 1.721e9}
    published["llama-8b"] = 8.030e9 - 128256 * 4096  # less its output layer, which the others share with the input
    assert model.num_parameters() == pytest.approx(published[name], rel=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_streamed_weights_are_plain_safetensors(tmp_path, threads):
    made = {"a.weight": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2)}
    shapes = {name: tensor.shape for name, tensor in made.items()}
    write_safetensors(tmp_path / "m.safetensors", shapes, torch.bfloat16, made.__getitem__, threads=threads)
    read = load_file(tmp_path / "m.safetensors")
    for name, tensor in made.items():
        assert torch.equal(read[name], tensor.to(torch.bfloat16))


def test_a_failed_run_leaves_nothing_and_spares_the_old_checkpoint(tmp_path):
    out = tmp_path / "small"
    command = ["init", "--backbone", "tiny", "--random-weights", "--random-items", "20", "--codes", "8", str(out)]
    assert main(command) == 0
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "--heads", "5"]) == 2
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_mistakes_are_named(tmp_path, capsys, local_checkpoint):
    assert main(["init", "--backbone", "llama-1b", str(tmp_path / "x")]) == 2
    assert "--random-weights" in capsys.readouterr().err
    assert main(["init", "--backbone", "nowhere", str(tmp_path / "x")]) == 2
    assert "neither a folder nor one of" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main(["init", "--backbone", str(other), "--random-items", "5", str(tmp_path / "x")]) == 2
    assert "gpt2" in capsys.readouterr().err
