"""What training adds from outside against overfitting: dropout, which acts in training alone, ties and losses."""

from __future__ import annotations

import pytest
import torch

from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM
from nezha_vllm.training.options import TrainingOptions
from nezha_vllm.training.regularise import add_dropout, add_head_dropout, tie_codes
from nezha_vllm.training.trainer import parameter_groups


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


@pytest.mark.parametrize(("by", "masks"), [("row", 1), ("token", 3)])
def test_a_row_or_each_of_its_tokens_has_a_mask(model, by, masks):
    add_dropout(model, 0.5, by)
    embed = model.train().model.embed_tokens
    dropped = embed(torch.tensor([[model.config.code_token_offsets[0]] * 3]))[0] == 0
    assert len(dropped.unique(dim=0)) == masks


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


def test_tied_codes_are_the_embeddings_in_training_and_in_the_checkpoint(model):
    hidden_NSH, codes_NL = torch.randn(5, 4, 64), torch.randint(4, (5, 3))
    plain = model.code_log_probs(hidden_NSH, codes_NL)
    tie_codes(model, "both")
    tied = model.code_log_probs(hidden_NSH, codes_NL)
    assert not torch.allclose(tied[0], plain[0])
    sum(log_p.sum() for log_p in tied).backward()
    assert all(parameter.grad is None for parameter in model.draft_head.logit_heads.parameters())
    first = model.config.code_token_offsets
    assert (model.model.embed_tokens.weight.grad[first[0] : first[2] + 4] != 0).any(1).all()
    assert not any(parameter is model.draft_head.logit_heads[0].weight for parameter in trained(model))
    model.copy_tied_codes()
    for found, expected in zip(model.draft_head(hidden_NSH, codes_NL), tied, strict=True):
        torch.testing.assert_close(found, expected)


def trained(model):
    return [member for group in parameter_groups(model, TrainingOptions()) for member in group["params"]]


def test_weights_of_levels_weigh_their_losses(model):
    hidden_NSH, codes_NL = torch.randn(5, 4, 64), torch.randint(4, (5, 3))
    counts = torch.tensor([True, True, True, True, False])
    logits = model.code_log_probs(hidden_NSH, codes_NL)
    single = [-log_p.gather(1, codes_NL[:, level, None])[:4].mean() for level, log_p in enumerate(logits)]
    model.level_weights = (3.0, 1.0, 1.0)
    expected = (3 * single[0] + single[1] + single[2]) / 5
    torch.testing.assert_close(model._loss(logits, codes_NL, counts), expected)
