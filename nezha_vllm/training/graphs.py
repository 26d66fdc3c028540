"""Small models wait for launches, not for arithmetic: a step's kernels as one CUDA graph, and fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_GRAPHS = 32  # shapes of batches; a graph takes gradients of its own and a tenth of a second to capture
WARM_UP = 3  # steps before the first capture, as torch asks for: libraries allocate what they keep


@dataclass
class _Graph:
    """``grads``: each parameter and where a replay leaves its gradient."""

    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor
    grads: list[tuple[nn.Parameter, Tensor]]


class StepGraphs:
    """Forward and backward pass of a batch, captured once a shape and replayed: ``steps(batch)`` → loss, gradients set.

    Everything that changes from step to step is either in the batch, on the GPU, or drawn by CUDA's generator, which
    graphs advance. Gradients are overwritten, not added to, and are good until the next call. Graphs share the memory
    of activations; gradients each has of its own, and where the GPU has no room for them capturing fails.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.model, self.loss_of = model, loss_of
        self.graphs: dict[tuple, _Graph] = {}
        self.pool: tuple | None = None

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Raises ``RuntimeError`` where this model cannot be captured."""
        shape = tuple(batch["input_ids"].shape)
        if shape not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                return self._eager(batch)
            self.graphs[shape] = self._capture(batch)
        captured = self.graphs[shape]
        for name, values in captured.batch.items():
            values.copy_(batch[name])
        captured.graph.replay()
        for parameter, gradient in captured.grads:
            parameter.grad = gradient
        return captured.loss

    def _eager(self, batch: dict[str, Tensor]) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        loss.backward()
        return loss.detach()

    def _capture(self, batch: dict[str, Tensor]) -> _Graph:
        batch = {name: values.clone(memory_format=torch.contiguous_format) for name, values in batch.items()}
        if not self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._eager(batch)
            torch.cuda.current_stream().wait_stream(stream)
            self.pool = torch.cuda.graph_pool_handle()
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # which a capture that fails would not go back to
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                loss = self._eager(batch)
        except RuntimeError:
            # its generator would be left in the capture, and nothing could be drawn any more
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        grads = [(parameter, parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        return _Graph(graph, batch, loss, grads)


def fuse_norms(model: nn.Module) -> None:
    """Let RMS norms be torch's own, one kernel instead of six; same figures up to rounding."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "Qwen3RMSNorm"):
            module.forward = FusedNorm(module)  # type: ignore[method-assign]


class FusedNorm:
    """Of one module, whose weight it looks up at every call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        shape = hidden_states.shape[-1:]
        return F.rms_norm(hidden_states.to(weight.dtype), shape, weight, self.module.variance_epsilon)  # type: ignore[arg-type]
