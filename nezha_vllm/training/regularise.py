"""Against overfitting of small models, added from outside: dropout, which published backbones lack, and tied codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_dropout(model: nn.Module, rate: float, by: str = "row") -> None:
    """Drop features of the embeddings and of every block's output, in training mode only.

    By ``row`` one mask serves all its tokens: masks by ``token`` cost 18 % of a training step on a CPU, in random
    numbers alone, and a packed row stays equal to its prefixes.
    """
    if rate == 0:
        return
    backbone = model.model
    outputs = [block for layer in backbone.layers for block in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    drop = _drop if by == "row" else F.dropout
    embedding = getattr(model, "item_embeddings", None) or backbone.embed_tokens
    for module in (embedding, *outputs):
        module.register_forward_hook(lambda module, _, output: drop(output, rate) if module.training else output)


def add_head_dropout(model: nn.Module, rate: float) -> None:
    """Drop features, target by target, of the draft head's code embeddings and of what its output layers read.

    The codes of a target reach its later levels past every block of the backbone, so ``add_dropout`` does not stop the
    head from learning targets by heart. The language model has no head; its codes pass through the blocks.
    """
    head = getattr(model, "draft_head", None)
    if rate == 0 or head is None:
        return

    def embedded(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    def read(module: nn.Module, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(F.dropout(values, rate, module.training) for values in features)

    for embedding in head.code_embeddings:
        embedding.register_forward_hook(embedded)
    for output_layer in head.logit_heads:
        output_layer.register_forward_pre_hook(read)


TIES = {"": (), "in": ("code_embeddings",), "out": ("logit_heads",), "both": ("code_embeddings", "logit_heads")}


def tie_codes(model: nn.Module, which: str) -> None:
    """Let the draft head read codes (``in``), predict them (``out``) or both with the backbone's embeddings.

    The language model is tied in any case. A code that is seldom a target is then learned from histories, too, and the
    head has fewer numbers to learn targets by heart with. Its own weights follow by ``model.copy_tied_codes()``, so
    that a checkpoint is like any other and costs nothing in serving.
    """
    head = getattr(model, "draft_head", None)
    if head is None:
        return
    model.tied_codes = TIES[which]  # type: ignore[assignment]
    for part in TIES[which]:
        getattr(head, part).requires_grad_(False)


def _drop(values_NQH: Tensor, rate: float) -> Tensor:
    count, _, hidden = values_NQH.shape
    kept_N1H = torch.empty(count, 1, hidden, dtype=values_NQH.dtype, device=values_NQH.device).bernoulli_(1 - rate)
    return values_NQH * (kept_N1H / (1 - rate))
