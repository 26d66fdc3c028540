"""The worker on GPUs: picks the runner. Which one vLLM makes, V1 or V2, is vLLM's choice."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from nezha_vllm.engine.catalogue_rpc import CatalogueRpc
from nezha_vllm.engine.runner_v1 import NezhaRunnerMixin


class NezhaGPUModelRunner(NezhaRunnerMixin, GPUModelRunner):
    pass


class NezhaGPUWorker(CatalogueRpc, Worker):
    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner.__class__ = NezhaGPUModelRunner
            return
        from nezha_vllm.engine import runner_v2

        if type(self.model_runner) is runner_v2.GPUModelRunner:
            self.model_runner.__class__ = runner_v2.NezhaModelRunner

    def lean_steps(self) -> int | None:
        """How many steps were lean, for tests and benchmarks: ``llm.collective_rpc("lean_steps")``; None with V1."""
        return getattr(self.model_runner, "lean_steps", None)
