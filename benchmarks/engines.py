"""Systems that are asked offline through vLLM's ``LLM``: NEZHA, stock beam search, and the engine's own floor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.stock import beside, stock_checkpoint
from benchmarks.workload import Cell

Prompts = Sequence[Sequence[int]]


class System(Protocol):
    """Answers prompts of token ids without placeholders; an answer is complete, on the CPU, when the call returns."""

    prefix_caching: bool

    def answer(self, prompts: Prompts, cell: Cell) -> object: ...

    def close(self) -> None: ...


def open_system(name: str, checkpoint: str, vllm_args: Sequence[str], in_process: bool) -> System:
    """Load a system by its name in ``options.OFFLINE``."""
    if name.startswith("hf-"):
        from benchmarks import hf_peers

        return hf_peers.SYSTEMS[name](checkpoint)
    # both are read when vLLM is imported or an engine made
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    return ENGINES[name](checkpoint, vllm_args)


class _Engine:
    def __init__(self, folder: str, vllm_args: Sequence[str]) -> None:
        from vllm import LLM, EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        arguments = parser.parse_args(["--model", str(folder), *vllm_args])
        self.llm = LLM.from_engine_args(EngineArgs.from_cli_args(arguments))
        self.prefix_caching = bool(self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)

    def _generate(self, prompts: Prompts, params: Any) -> Any:
        return self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Nezha(_Engine):
    """This project: ``LLM.generate`` with the plugin."""

    def answer(self, prompts: Prompts, cell: Cell) -> object:
        from vllm import SamplingParams

        outputs = self._generate(prompts, SamplingParams(n=cell.n, extra_args={"beam_width": cell.beam_width}))
        assert all(len(output.outputs) == cell.n for output in outputs), "fewer items than asked for"
        return outputs


class StockBeamSearch(_Engine):
    """``LLM.beam_search`` of unmodified vLLM: L decoding steps, all K beams returned, no catalogue constraint."""

    def __init__(self, checkpoint: str, vllm_args: Sequence[str]) -> None:
        self.levels = _levels(checkpoint)
        # beam search asks for 2 K logprobs; vLLM allows 20 unless told otherwise
        super().__init__(str(stock_checkpoint(checkpoint, beside(checkpoint))), ["--max-logprobs", "-1", *vllm_args])

    def answer(self, prompts: Prompts, cell: Cell) -> object:
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(beam_width=cell.beam_width, max_tokens=self.levels, ignore_eos=True)
        outputs = self.llm.beam_search([{"prompt_token_ids": list(ids)} for ids in prompts], params)
        assert all(len(output.sequences) == cell.beam_width for output in outputs), "fewer beams than asked for"
        return outputs


class StockOneToken(_Engine):
    """Unmodified vLLM generating one token of the same prompt: what the engine alone costs."""

    def __init__(self, checkpoint: str, vllm_args: Sequence[str]) -> None:
        super().__init__(str(stock_checkpoint(checkpoint, beside(checkpoint))), vllm_args)

    def answer(self, prompts: Prompts, cell: Cell) -> object:
        from vllm import SamplingParams

        return self._generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))


ENGINES: dict[str, Any] = {"nezha": Nezha, "vllm-beam": StockBeamSearch, "vllm-one-token": StockOneToken}


def _levels(checkpoint: str) -> int:
    from benchmarks.workload import Workload

    return Workload.of(checkpoint).levels
