"""Dropout for small models, added from outside: the published backbones have none on embeddings or residuals."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def add_dropout(model: nn.Module, rate: float) -> None:
    """Drop features of the embeddings and of every block's output, in training mode only.

    One mask serves all tokens of a row: per-token masks cost 18 % of a training step on a CPU, in random numbers alone,
    and a packed row stays equal to its prefixes.
    """
    if rate == 0:
        return
    backbone = model.model
    outputs = [block for layer in backbone.layers for block in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (backbone.embed_tokens, *outputs):
        module.register_forward_hook(lambda module, _, output: _drop(output, rate) if module.training else output)


def _drop(values_NQH: Tensor, rate: float) -> Tensor:
    count, _, hidden = values_NQH.shape
    kept_N1H = torch.empty(count, 1, hidden, dtype=values_NQH.dtype, device=values_NQH.device).bernoulli_(1 - rate)
    return values_NQH * (kept_N1H / (1 - rate))
