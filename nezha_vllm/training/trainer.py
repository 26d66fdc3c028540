"""The Trainer of transformers with NEZHA's learning rates and its own validation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from nezha_vllm.training.graphs import StepGraphs
from nezha_vllm.training.options import TrainingOptions

logger = logging.getLogger(__name__)

EAGER = "NEZHA_EAGER_TRAINING"  # in the environment: no CUDA graphs
QUIET_WEIGHT_DECAY = 1e-3  # relative weight decay of code embeddings and cells (method.md, training)


def parameter_groups(model: nn.Module, options: TrainingOptions) -> list[dict[str, Any]]:
    """Learning rate and weight decay by part; norms and biases do not decay."""
    rates = {"code_embeddings": options.code_embedding_rate, "cells": options.cell_rate}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part in rates if f"draft_head.{part}." in name), None)
        decay = options.weight_decay * (QUIET_WEIGHT_DECAY if part else 1.0)
        key = (options.learning_rate * rates.get(part or "", 1.0), decay if parameter.dim() > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


class NezhaTrainer(Trainer):
    """``validate()`` returns the metrics of ``evaluate``; everything else, multi-GPU included, is the Trainer's."""

    def __init__(self, options: TrainingOptions, validate: Callable[[], dict[str, float]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options, self.validate = options, validate
        self.ndcg_by_weight: dict[float, float] = {}  # of item scores, on the validation items; set by `fit`
        one_gpu = self.args.device.type == "cuda" and self.args.world_size == 1
        wanted = one_gpu and not os.environ.get(EAGER)
        self.graphs = StepGraphs(self.model, self._loss) if wanted else None
        # forward takes **kwargs, but its loss is a mean: the Trainer must average over accumulated steps
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(model if model is not None else self.model, self.options)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.graphs is None or self.args.gradient_accumulation_steps > 1:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        try:
            return self.graphs(inputs)
        except RuntimeError as error:
            why = str(error)  # a GPU, its memory or a version that cannot capture this: slower, and the same
        # behind the handler and without the error, whose frames hold the graphs and all their memory
        logger.warning("training goes on without CUDA graphs: %s", why)
        self.graphs = None
        model.zero_grad()
        return super().training_step(model, inputs, num_items_in_batch)

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).loss  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        return 0  # counting walks over all modules at every step

    @property
    def validations(self) -> list[tuple[float, float, float]]:
        """Epoch, loss and NDCG@10 of each validation, those before an interruption too."""
        found = [entry for entry in self.state.log_history if "eval_loss" in entry]
        return [
            (round(entry["epoch"], 2), round(entry["eval_loss"], 4), round(entry["eval_ndcg@10"], 4)) for entry in found
        ]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        with torch.random.fork_rng():  # an evaluation must not change what training draws next
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.model.train()  # type: ignore[union-attr]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EpochLine(TrainerCallback):
    """One readable line an epoch instead of the Trainer's dictionaries."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.train_loss = write, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.train_loss = (logs or {}).get("loss", self.train_loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        shown = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in arguments["metrics"].items())
        self.write(f"epoch {round(state.epoch or 0)}: training loss {self.train_loss:.4f}  validation {shown}")
