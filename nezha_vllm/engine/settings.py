"""What a running server needs to know beyond vLLM's own configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nezha_vllm.config import MAX_BEAM_WIDTH, SHARED_ID_POLICIES, VALIDITY_MODES, NezhaConfig
from nezha_vllm.pointer import is_store, version_folder

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

OPTIONS = (
    "catalogue", "catalogue_version", "catalogue_poll_seconds", "beam_width", "max_beam_width", "validity",
    "shared_ids", "lean_step", "worker_process", "max_concurrent_requests",
)  # fmt: skip
CONCURRENT_REQUESTS = 1024  # a second's work of an API process in front of a GPU
ENGINES_HERE = "NEZHA_ENGINES_HERE"  # set for child processes: vLLM tells each of several dense engines it is alone
POLL_SECONDS, MIN_POLL_SECONDS = 5.0, 0.1


@dataclass(frozen=True)
class ServerSettings:
    """Defaults from the checkpoint's ``config.json``, overridden by ``--additional-config '{"nezha": {…}}'``.

    ``catalogue_version`` is the only version the server may start with, None for any. The config hook sets it to the
    one it read, so that engine and API processes, which read the folder one after the other, cannot differ.
    ``catalogue_poll_seconds`` is how often the pointer of a store is looked at, 0 for never: the default where the user
    asked for a version.
    ``max_concurrent_requests`` is how many an API process works on at once, 0 for any number.
    ``lean_step`` allows the steps of ``engine/lean_step.py``, a matter of the server alone.
    ``worker_process`` leaves each of several engines a process for its only worker, as vLLM has it.
    """

    catalogue: Path
    catalogue_version: str | None
    catalogue_poll_seconds: float
    beam_width: int
    max_beam_width: int
    validity: str
    shared_ids: str
    lean_step: bool
    worker_process: bool
    max_concurrent_requests: int

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> ServerSettings:
        """Raises ``ValueError`` that names the wrong option or field and the remedy."""
        config: NezhaConfig = vllm_config.model_config.hf_config
        config.check()
        if config.method != "nezha":
            raise ValueError(
                f"config.json: method is {config.method!r}, which is there to be compared with and not served; "
                "measure it with `nezha evaluate`, serve a checkpoint of `nezha train --method nezha`"
            )
        options = (vllm_config.additional_config or {}).get("nezha", {})
        if not isinstance(options, dict):
            raise ValueError(f'--additional-config: "nezha" must be an object of {list(OPTIONS)}, got {options!r}')
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"--additional-config: nezha options {unknown} are unknown; there are {list(OPTIONS)}")
        values: dict[str, Any] = {name: options.get(name, getattr(config, name, None)) for name in OPTIONS}
        widths = (values["beam_width"], values["max_beam_width"])
        if not all(type(width) is int for width in widths) or not 1 <= widths[0] <= widths[1] <= MAX_BEAM_WIDTH:
            raise ValueError(
                f"need integers 1 ≤ beam_width ≤ max_beam_width ≤ {MAX_BEAM_WIDTH}, got {widths[0]!r} and {widths[1]!r}"
            )
        if values["validity"] not in VALIDITY_MODES:
            raise ValueError(f"validity is {values['validity']!r}, must be one of {VALIDITY_MODES}")
        if values["shared_ids"] not in SHARED_ID_POLICIES:
            raise ValueError(f"shared_ids is {values['shared_ids']!r}, must be one of {SHARED_ID_POLICIES}")
        for name, default in (("lean_step", True), ("worker_process", False)):
            values[name] = options.get(name, default)
            if not isinstance(values[name], bool):
                raise ValueError(f"{name} is {values[name]!r}, must be true or false")
        most = values["max_concurrent_requests"] = options.get("max_concurrent_requests", CONCURRENT_REQUESTS)
        if type(most) is not int or most < 0:
            raise ValueError(f"max_concurrent_requests is {most!r}, must be a whole number, 0 for no limit")
        values["catalogue_poll_seconds"] = _poll_seconds(options)
        model = vllm_config.model_config.model
        values["catalogue"] = _resolve(str(values["catalogue"]), model, vllm_config.model_config.revision)
        return cls(**values)

    @property
    def start_folder(self) -> Path:
        """What to start from: of a store the version asked for, also where another one is current by now."""
        if self.catalogue_version is None or not is_store(self.catalogue):
            return self.catalogue
        return version_folder(self.catalogue, self.catalogue_version)

    @property
    def follows(self) -> bool:
        """Whether versions that are published while the server runs are taken up."""
        return self.catalogue_poll_seconds > 0 and is_store(self.catalogue)

    def check_version(self, found: str) -> None:
        """Raise ``ValueError`` if the catalogue's folder holds another version than the one to start with."""
        if self.catalogue_version not in (None, found):
            raise ValueError(
                f"catalogue {self.catalogue} is version {found}, but the server is to start with "
                f"{self.catalogue_version}: publish that one there, or start again if it was replaced meanwhile"
            )


def workers_here(parallel: ParallelConfig) -> int:
    """Workers of this server on this machine; of engines that are Ray's actors only the own."""
    engines = max(1, parallel.data_parallel_size_local, int(os.environ.get(ENGINES_HERE, 1)))
    return parallel.local_world_size * engines


def _poll_seconds(options: dict[str, Any]) -> float:
    asked_for = options.get("catalogue_version") is not None
    seconds = options.get("catalogue_poll_seconds", 0 if asked_for else POLL_SECONDS)
    if type(seconds) not in (int, float) or not (seconds == 0 or MIN_POLL_SECONDS <= seconds < float("inf")):
        raise ValueError(f"catalogue_poll_seconds is {seconds!r}, must be 0 or at least {MIN_POLL_SECONDS}")
    return seconds


def _resolve(catalogue: str, model: str, revision: str | None) -> Path:
    """Folder of the catalogue: absolute, or inside the checkpoint."""
    if Path(catalogue).is_absolute():
        return Path(catalogue)
    return checkpoint_folder(model, revision, f"{catalogue}/*") / catalogue


def checkpoint_folder(model: str, revision: str | None, files: str) -> Path:
    """The local checkpoint, or what one on a hub has of these files."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=files))


def weights_folder(model_config: ModelConfig) -> Path:
    """Where the checkpoint's weights are, for what is no weight among them."""
    return checkpoint_folder(model_config.model, model_config.revision, "model*.safetensors*")
