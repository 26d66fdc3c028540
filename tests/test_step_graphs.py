"""Steps of a training as CUDA graphs: the same losses, gradients and weights as without; and what makes shapes few."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from nezha_vllm.hf.backbones import tiny_shape
from nezha_vllm.hf.checkpoint import scratch_config
from nezha_vllm.hf.modeling import MODEL_CLASSES
from nezha_vllm.training.graphs import FusedNorm, StepGraphs, fuse_norms
from nezha_vllm.training.packing import PackedCollator
from nezha_vllm.training.trainer import NezhaTrainer

SIZES = [8, 8, 8]


def model_of(method="nezha", family="llama"):
    torch.manual_seed(0)
    config, _ = scratch_config(tiny_shape(family, hidden_size=64, num_attention_heads=2), SIZES)
    config.method = method
    return MODEL_CLASSES[family](config)


def pieces(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, (2 + n % 6, 3), generator=generator) for n in range(count)]


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", ["nezha", "mtp", "ar"])
def test_rows_without_targets_change_neither_loss_nor_gradients(method):
    model = model_of(method)
    plain = PackedCollator(model.config, 6)(pieces(5))
    padded = PackedCollator(model.config, 6, row_multiple=8)(pieces(5))
    assert len(padded["input_ids"]) == 8 > len(plain["input_ids"])
    assert "labelled" not in padded
    torch.testing.assert_close(gradients(model, padded), gradients(model, plain), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_norms_are_the_backbones(family):
    model = model_of(family=family)
    batch = PackedCollator(model.config, 6)(pieces(5))
    expected = gradients(model, batch)
    fuse_norms(model)
    assert isinstance(model.model.norm.forward, FusedNorm)
    torch.testing.assert_close(gradients(model, batch), expected, atol=1e-6, rtol=1e-4)


def test_a_step_that_cannot_be_captured_is_made_with_the_memory_of_the_graphs(monkeypatch):
    def none(batch):
        raise RuntimeError("out of memory")

    trainer = NezhaTrainer.__new__(NezhaTrainer)
    trainer.args = SimpleNamespace(gradient_accumulation_steps=1)
    model = model_of()
    trainer.graphs = StepGraphs(model, none)
    monkeypatch.setattr(StepGraphs, "_capture", StepGraphs._eager)  # no GPU here
    graphs = weakref.ref(trainer.graphs)
    monkeypatch.setattr(Trainer, "training_step", lambda *_: graphs())
    left = trainer.training_step(model, PackedCollator(model.config, 6)(pieces(5)))
    assert left is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nezha", "ar"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replayed_steps_train_as_others_do(method, family):
    eager = model_of(method, family).cuda()
    fuse_norms(eager)
    collator = PackedCollator(eager.config, 6, device="cuda", row_multiple=4)
    batches = [collator(pieces(count, seed)) for seed, count in enumerate([5, 20, 6, 21, 5])]
    assert len({len(batch["input_ids"]) for batch in batches}) > 1
    replayed = copy.deepcopy(eager)
    fuse_norms(replayed)
    steps = StepGraphs(replayed, lambda batch: replayed(**batch).loss)
    optimizers = [torch.optim.AdamW(one.parameters(), 1e-2, fused=True) for one in (eager, replayed)]
    for batch in batches:
        expected = gradients(eager, batch)
        loss = steps(batch)
        found = [loss, *(p.grad for p in replayed.parameters() if p.grad is not None)]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-2)
        for optimizer in optimizers:
            optimizer.step()
        replayed.zero_grad()
    assert len(steps.graphs) > 1


@pytest.mark.gpu
def test_every_replay_drops_other_features():
    model = model_of().cuda().train()
    model.model.embed_tokens.register_forward_hook(lambda module, _, out: torch.nn.functional.dropout(out, 0.5))
    batch = PackedCollator(model.config, 6, device="cuda", row_multiple=4)(pieces(5))
    steps = StepGraphs(model, lambda batch: model(**batch).loss)
    assert len({float(steps(batch)) for _ in range(4)}) == 4


@pytest.mark.gpu
def test_torch_is_as_it_was_behind_a_capture_that_failed():
    model = model_of().cuda().train()

    def loss_of(batch):
        loss = model(**batch).loss
        float(loss)  # the host waits, which no graph can hold
        return torch.nn.functional.dropout(loss, 0.5)

    stream, batch = torch.cuda.current_stream(), PackedCollator(model.config, 6, device="cuda")(pieces(5))
    with pytest.raises(RuntimeError):
        StepGraphs(model, loss_of)(batch)
    assert torch.cuda.current_stream() == stream
    assert loss_of(batch).isfinite()
