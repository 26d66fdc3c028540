"""The worker on CPUs. Imported there alone: vLLM's CPU worker changes classes that its GPU runner uses."""

from __future__ import annotations

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from nezha_vllm.engine.catalogue_rpc import CatalogueRpc
from nezha_vllm.engine.runner_v1 import NezhaRunnerMixin


class NezhaCPUModelRunner(NezhaRunnerMixin, CPUModelRunner):
    pass


class NezhaCPUWorker(CatalogueRpc, CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        if not getattr(self, "use_v2_model_runner", False):
            self.model_runner.__class__ = NezhaCPUModelRunner
