"""A moving average of the weights over the steps: what is validated and kept, while training goes on with its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

FILE = "averages.safetensors"  # in a checkpoint of the Trainer


class Averages(TrainerCallback):
    """``decay`` of the average a step; over the first steps less, so that it forgets the random start.

    Weights are changed in place: CUDA graphs read them where they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        self.names, self.weights = [name for name, _ in named], [one for _, one in named]
        self.decay = decay
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            partial = folder / f"{FILE}.partial"
            save_file(dict(zip(self.names, self.averages, strict=True)), partial)
            partial.replace(folder / FILE)  # a run that is killed here leaves no half of one

    def load(self, checkpoint: str | Path) -> None:
        """The averages that were saved with a checkpoint of the Trainer."""
        saved = load_file(Path(checkpoint) / FILE, device=str(self.averages[0].device))
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(saved[name])

    @torch.no_grad()
    def put(self) -> None:
        """Make the averages the model's weights."""
        torch._foreach_copy_(self.weights, self.averages)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model has the averages as its weights, and its own again afterwards."""
        own = [weight.detach().clone() for weight in self.weights]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, own)
