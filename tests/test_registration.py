"""The plugin's way into vLLM, without starting an engine."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nezha_vllm.config import ARCHITECTURES

ROOT = Path(__file__).parents[1]


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (plugin,) = [found for found in entry_points(group="vllm.general_plugins") if found.name == "nezha"]
    plugin.load()()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in ARCHITECTURES.values():
        assert architecture in ModelRegistry.get_supported_archs()
        assert architecture in MODELS_CONFIG_MAP


def test_registering_twice_changes_nothing() -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY

    from nezha_vllm import register

    register()
    before = dict(RENDERER_REGISTRY.renderers)
    register()
    assert before == RENDERER_REGISTRY.renderers


def test_registering_changes_no_class_of_vllm_and_imports_no_worker() -> None:
    """Other models served beside the installed plugin must find vLLM as it is.

    vLLM's CPU worker replaces classes of Model Runner V2 as it is imported.
    """
    script = (
        "import sys, nezha_vllm; nezha_vllm.register();"
        "from vllm.v1.engine.input_processor import InputProcessor as I;"
        "from vllm.v1.engine.output_processor import RequestState as R;"
        "assert not hasattr(I.process_inputs, '__wrapped__');"
        "assert not hasattr(R.from_new_request, '__wrapped__');"
        "import nezha_vllm.engine.gpu_worker, nezha_vllm.engine.model;"
        "assert 'vllm.v1.worker.cpu_worker' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True)


def test_every_wrapped_signature_is_the_expected_one() -> None:
    from nezha_vllm.frontend.install import _called, _wrappers, completions_route, probe

    for owner, name, arguments in [wrapper[:3] for wrapper in _wrappers()] + _called():
        probe(owner, name, arguments)
    assert completions_route().path == "/v1/completions"


def test_a_changed_signature_is_reported_by_name() -> None:
    from nezha_vllm.frontend.install import VllmChangedError, probe

    class Changed:
        def process_inputs(self, prompt: str, request_id: str) -> None: ...

    with pytest.raises(VllmChangedError, match=r"Changed\.process_inputs takes \['prompt', 'request_id'\]"):
        probe(Changed, "process_inputs", ("request_id", "prompt", "params"))
    with pytest.raises(VllmChangedError, match=r"Changed\.from_new_request is gone"):
        probe(Changed, "from_new_request", ())


def test_vllms_contract_with_schedulers_and_runners_is_the_expected_one() -> None:
    """Private names that the engine builds on; each would fail late and far away if vLLM renamed it."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    found = list(inspect.signature(KVCacheCoordinator.find_longest_cache_hit).parameters)
    assert found == ["self", "block_hashes", "max_cache_hit_length"]
    assert "self.coordinator.find_longest_cache_hit" in inspect.getsource(KVCacheManager.get_computed_blocks)
    assert "self.num_prefill_lookahead" in inspect.getsource(Scheduler._reserve_prefill_lookahead)
    assert "discard_request_mask" in inspect.getsource(GPUModelRunner)
    assert "logits_indices" in inspect.getsource(GPUModelRunner._prepare_inputs)
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")


@pytest.mark.parametrize(
    ("budget", "longest_prompt", "expected"),
    [(8192, 2048, (4096, False)), (2048, 2048, (2048, False)), (64, 2048, (64, True)), (8192, 8192, (8192, True))],
)
def test_steps_stay_inside_graphs_where_every_prompt_fits_one(
    budget: int, longest_prompt: int, expected: tuple[int, bool]
) -> None:
    """Without chunks, a prompt longer than a step's budget would wait for ever."""
    from types import SimpleNamespace

    from nezha_vllm.engine.config_hook import keep_steps_in_graphs

    scheduler = SimpleNamespace(max_num_batched_tokens=budget, enable_chunked_prefill=True)
    keep_steps_in_graphs(scheduler, longest_prompt)
    assert (scheduler.max_num_batched_tokens, scheduler.enable_chunked_prefill) == expected


@pytest.mark.parametrize(
    ("v2", "longest", "given", "largest"),
    [
        (True, 1024, None, 4096),
        (True, 1024, 2048, 2048),
        (True, 1024, 8192, 4096),
        (False, 1024, None, 1024),
        (False, 1000, None, 1000),
        (False, 1024, 2048, 1024),
        (False, 1024, 100, 100),
        (False, 8192, None, 4096),
        (False, 5, None, 5),
    ],
)
def test_model_runner_v1_captures_no_step_longer_than_a_prompt(
    monkeypatch: pytest.MonkeyPatch, v2: bool, longest: int, given: int | None, largest: int
) -> None:
    """It would read blocks behind its table, on a GPU an illegal memory access."""
    from types import SimpleNamespace

    import torch
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    from nezha_vllm.engine.config_hook import SPLITS_OF_VLLM, set_gpu_defaults

    monkeypatch.setattr(type(current_platform), "is_device_capability", classmethod(lambda cls, *_: True))
    compilation = SimpleNamespace(cudagraph_mode=None, cudagraph_capture_sizes=None, max_cudagraph_capture_size=given)
    config = SimpleNamespace(
        use_v2_model_runner=v2,
        scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=8192, enable_chunked_prefill=True),
        model_config=SimpleNamespace(dtype=torch.bfloat16, enforce_eager=False, max_model_len=longest),
        compilation_config=compilation,
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=SPLITS_OF_VLLM),
    )
    set_gpu_defaults(config)
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL
    assert max(compilation.cudagraph_capture_sizes) == largest
    assert compilation.max_cudagraph_capture_size in (None, largest)  # vLLM refuses what is not the largest size
    compilation.cudagraph_mode, compilation.cudagraph_capture_sizes = None, [8, longest + 1]  # the user's
    set_gpu_defaults(config)
    assert compilation.cudagraph_mode == (CUDAGraphMode.FULL if v2 else None)
    assert compilation.cudagraph_capture_sizes == [8, longest + 1]
