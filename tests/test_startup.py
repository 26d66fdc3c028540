"""What cannot be served stops start-up with a message that names the file or flag and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import in_process

from nezha_vllm.catalogue import Catalogue

pytestmark = pytest.mark.slow


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "nezha-broken"))


def configure(checkpoint: Path, **options: Any) -> Any:
    """Everything that `vllm serve` does before it starts an engine process, renderer included."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.registry import renderer_from_config

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    config = EngineArgs(model=str(checkpoint), **(settings | options)).create_engine_config()
    renderer_from_config(config)
    return config


def edit(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_no_flag_is_needed(checkpoint: Path) -> None:
    config = configure(checkpoint)
    assert config.parallel_config.worker_cls.startswith("nezha_vllm.engine.")
    assert config.scheduler_config.scheduler_cls == "nezha_vllm.engine.scheduler.make_scheduler"
    assert config.model_config.tokenizer_mode == "nezha"


def test_a_cpu_server_takes_a_cache_for_its_longest_prompt_unless_told_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert configure(checkpoint).cache_config.kv_cache_memory_bytes == 1 << 30
    assert configure(checkpoint, kv_cache_memory_bytes=1 << 28).cache_config.kv_cache_memory_bytes == 1 << 28
    assert configure(checkpoint, gpu_memory_utilization=0.5).cache_config.kv_cache_memory_bytes is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert configure(checkpoint).cache_config.kv_cache_memory_bytes == 2 << 30


def test_a_cpu_server_does_not_compile_unless_told_to(checkpoint: Path) -> None:
    from vllm.config import CompilationMode

    assert configure(checkpoint, enforce_eager=False).compilation_config.mode == CompilationMode.NONE
    told = configure(checkpoint, enforce_eager=False, compilation_config={"mode": 3})
    assert told.compilation_config.mode != CompilationMode.NONE


def test_missing_catalogue(broken: Path) -> None:
    shutil.rmtree(broken / "catalogue")
    with pytest.raises(ValueError, match=r"manifest\.json.*nezha tokenize"):
        configure(broken)


@pytest.mark.parametrize("name", ["manifest.json", "items.arrow", "keys.safetensors"])
def test_damaged_catalogue(broken: Path, name: str) -> None:
    path = broken / "catalogue" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ValueError, match=name):
        configure(broken)


def test_catalogue_of_other_levels(broken: Path) -> None:
    Catalogue.build(["a"], [[0, 0, 0]], [16, 24, 33]).save(broken / "catalogue")
    with pytest.raises(ValueError, match=r"catalogue .* has codebook sizes \[16, 24, 33\] .* config\.json"):
        configure(broken)


def test_placeholders_missing_in_the_tokenizer(broken: Path) -> None:
    path = broken / "tokenizer.json"
    path.write_text(path.read_text().replace("<sp_2>", "<xx_2>"))
    with pytest.raises(ValueError, match=r"tokenizer of .*<sp_2>.*nezha init"):
        configure(broken)


def test_config_without_placeholders(broken: Path) -> None:
    edit(broken, placeholder_token_ids=[])
    with pytest.raises(ValueError, match=r"config\.json.*placeholder_token_ids"):
        configure(broken)


def test_draft_head_of_another_shape(broken: Path) -> None:
    edit(
        broken,
        codebook_sizes=[16, 24, 30],
        code_token_offsets=json.loads((broken / "config.json").read_text())["code_token_offsets"],
    )
    Catalogue.build(["a"], [[0, 0, 0]], [16, 24, 30]).save(broken / "catalogue")
    message = r"model\.safetensors: draft head weights \['logit_heads\.2\.weight'\]"
    with pytest.raises(ValueError, match=message), in_process(broken, max_model_len=64):
        pass


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv-transfer"),
        ({"kv_offloading_size": 1.0}, "kv-offloading-size"),
        ({"enable_lora": True}, "enable-lora"),
        ({"override_generation_config": {"repetition_penalty": 1.2}}, "override-generation-config"),
        ({"runner": "pooling"}, "runner pooling"),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 2}, "max-num-batched-tokens"),
        ({"tokenizer_mode": "mistral"}, "tokenizer-mode"),
        ({"additional_config": {"nezha": 5}}, "must be an object"),
        ({"additional_config": {"nezha": {"beam_widht": 5}}}, "beam_widht"),
        ({"additional_config": {"nezha": {"beam_width": 9, "max_beam_width": 5}}}, "max_beam_width"),
        ({"additional_config": {"nezha": {"validity": "always"}}}, "validity"),
        ({"additional_config": {"nezha": {"max_concurrent_requests": -1}}}, "max_concurrent_requests"),
    ],
)
def test_flags_that_cannot_work(checkpoint: Path, options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        configure(checkpoint, **options)


def test_the_rust_front_end(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        configure(checkpoint)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0"])
def test_a_vllm_outside_the_tested_range(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ValueError, match=r"0\.26 to 0\.34.*pip install"):
        configure(checkpoint)


def test_a_vllm_whose_patched_signatures_changed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "from_new_request", classmethod(lambda cls, request: None))
    with pytest.raises(RuntimeError, match=r"RequestState\.from_new_request takes \['request'\]"):
        configure(checkpoint)


def test_a_catalogue_replaced_while_the_server_starts(broken: Path) -> None:
    """API and engine process read the folder seconds apart."""
    from nezha_vllm.engine.settings import ServerSettings

    config = configure(broken)
    Catalogue.build(["a"], [[0, 0, 0]], [16, 24, 32]).save(broken / "catalogue")
    with pytest.raises(ValueError, match="replaced meanwhile"):
        ServerSettings.from_vllm(config).check_version(Catalogue.load(broken / "catalogue").version)


def test_a_version_of_the_catalogue_can_be_asked_for(checkpoint: Path) -> None:
    version = Catalogue.load(checkpoint / "catalogue").version
    configure(checkpoint, additional_config={"nezha": {"catalogue_version": version}})
    with pytest.raises(ValueError, match=f"is version {version}, but the server is to start with other"):
        configure(checkpoint, additional_config={"nezha": {"catalogue_version": "other"}})


def test_a_server_starts_from_the_current_version_of_a_store(broken: Path, tmp_path: Path) -> None:
    from nezha_vllm.catalogue import load_keys
    from nezha_vllm.engine.settings import ServerSettings
    from nezha_vllm.frontend.service import service_of
    from nezha_vllm.store import Store

    store = Store(tmp_path / "store")
    store.publish(broken / "catalogue")
    Catalogue.build(["a", "b"], [[0, 0, 0], [1, 2, 3]], [16, 24, 32], version="two").save(tmp_path / "two")
    store.publish(tmp_path / "two", force=True)
    edit(broken, catalogue=str(store.folder))
    shutil.rmtree(broken / "catalogue")
    config = configure(broken)
    service = service_of(config.model_config)
    assert service is not None
    assert service.catalogue.version == "two"
    settings = ServerSettings.from_vllm(config)
    settings.check_version(load_keys(settings.catalogue)[1])
    store.rollback()
    with pytest.raises(ValueError, match="replaced meanwhile"):
        settings.check_version(load_keys(settings.catalogue)[1])
    assert load_keys(settings.start_folder).version == "two", "the processes of a server start with the same"
    assert settings.follows
    pinned = configure(broken, additional_config={"nezha": {"catalogue_version": "two"}})
    assert service_of(pinned.model_config).catalogue.version == "two"
    assert not ServerSettings.from_vllm(pinned).follows, "who asks for a version stays with it"


@pytest.mark.parametrize("seconds", [-1, 0.01, True, "5", float("inf"), float("nan"), None])
def test_how_often_a_store_is_looked_at_must_be_a_number_of_seconds(checkpoint: Path, seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"catalogue_poll_seconds is .* must be 0 or at least 0\.1"):
        configure(checkpoint, additional_config={"nezha": {"catalogue_poll_seconds": seconds}})


def with_template(checkpoint: Path, single: list[str], added: dict[str, int]) -> None:
    """Let the tokenizer surround every prompt, as those of pretrained models do."""
    path = checkpoint / "tokenizer.json"
    tokens = [{"SpecialToken": {"id": name, "type_id": 0}} if name in added else {"Sequence": {"id": "A", "type_id": 0}}
              for name in single]  # fmt: skip
    special = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in added.items()}
    template = {"type": "TemplateProcessing", "single": tokens, "pair": tokens, "special_tokens": special}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))


def test_a_prompt_of_nothing_but_the_tokenizers_own_prefix_is_empty(broken: Path) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.registry import renderer_from_config

    with_template(broken, ["<pad>", "A"], {"<pad>": 256})
    config = configure(broken)
    renderer = renderer_from_config(config)
    params = renderer.default_cmpl_tok_params
    for empty in ("", "   ", "<sp_1><sp_2><sp_3>"):
        with pytest.raises(VLLMValidationError, match="prompt is empty"):
            renderer.tokenize_prompt({"prompt": empty}, params)
    tokens = renderer.tokenize_prompt({"prompt": "<item:item-1>"}, params)["prompt_token_ids"]
    assert tokens[0] == 256
    assert len(tokens) == 1 + 3 + 3


def test_a_tokenizer_that_puts_something_behind_the_prompt(broken: Path) -> None:
    with_template(broken, ["A", "<pad>"], {"<pad>": 256})
    with pytest.raises(ValueError, match="add_eos_token"):
        configure(broken)


def test_settings_of_the_server_override_the_checkpoint(checkpoint: Path) -> None:
    from nezha_vllm.engine.settings import ServerSettings

    config = configure(checkpoint, additional_config={"nezha": {"beam_width": 7, "validity": "final"}})
    settings = ServerSettings.from_vllm(config)
    assert (settings.beam_width, settings.max_beam_width, settings.validity) == (7, 512, "final")
