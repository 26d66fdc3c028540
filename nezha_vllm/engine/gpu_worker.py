"""The worker on GPUs: with Model Runner V2, the default, it changes nothing."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from nezha_vllm.engine.runner_v1 import NezhaRunnerMixin


class NezhaGPUModelRunner(NezhaRunnerMixin, GPUModelRunner):
    pass


class NezhaGPUWorker(Worker):
    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner.__class__ = NezhaGPUModelRunner
