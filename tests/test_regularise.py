"""Dropout that is added from outside: it acts in training, and only there."""

from __future__ import annotations

import pytest
import torch

from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM
from nezha_vllm.training.regularise import add_dropout, add_head_dropout


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = tiny_shape("llama", hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=None)
    return NezhaLlamaForCausalLM(scratch_config(shape, [4, 4, 4])[0]).eval()


def test_dropout_acts_in_training_only(model):
    first = model.config.code_token_offsets
    ids = torch.tensor([[*first, *model.config.placeholder_token_ids]])
    plain = model.hidden_states_for(ids)
    add_dropout(model, 0.5)
    assert torch.equal(model.hidden_states_for(ids), plain)
    assert not torch.equal(model.train().hidden_states_for(ids), plain)


def test_dropout_of_the_head_acts_on_every_level_in_training_only(model):
    hidden_NSH, codes_NL = torch.randn(1, 4, model.config.hidden_size), torch.tensor([[1, 2, 3]])
    plain = model.code_log_probs(hidden_NSH, codes_NL)
    add_head_dropout(model, 0.5)
    assert all(torch.equal(*pair) for pair in zip(model.code_log_probs(hidden_NSH, codes_NL), plain, strict=True))
    dropped = model.train().code_log_probs(hidden_NSH, codes_NL)
    assert not any(torch.equal(*pair) for pair in zip(dropped, plain, strict=True))


def test_the_language_model_has_no_head_to_drop(model):
    config = model.config
    config.method = "ar"
    ids = torch.tensor([[*config.code_token_offsets, *config.code_token_offsets[:-1]]])
    language_model = NezhaLlamaForCausalLM(config).train()
    plain = language_model(ids).hidden_states
    add_head_dropout(language_model, 0.5)
    assert torch.equal(language_model(ids).hidden_states, plain)
