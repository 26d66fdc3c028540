"""What the API process knows about a served NEZHA model: its catalogue, its limits, its special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.engine.settings import ServerSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


@dataclass(frozen=True)
class Service:
    settings: ServerSettings
    catalogue: Catalogue
    code_token_offsets: tuple[int, ...]
    placeholder_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int

    @classmethod
    def load(cls, vllm_config: VllmConfig) -> Service:
        """Read and check the checkpoint's catalogue and make it the model's service in this process.

        Raises ``ValueError`` or ``CatalogueError`` naming the file and the remedy.
        """
        settings = ServerSettings.from_vllm(vllm_config)
        catalogue = Catalogue.load(settings.catalogue)
        settings.check_version(catalogue.version)
        config = vllm_config.model_config.hf_config
        if list(catalogue.codec.codebook_sizes) != list(config.codebook_sizes):
            raise ValueError(
                f"catalogue {settings.catalogue} has codebook sizes {list(catalogue.codec.codebook_sizes)} but the "
                f"checkpoint's config.json has {list(config.codebook_sizes)}: serve the catalogue that the checkpoint "
                "was trained with"
            )
        service = cls(
            settings,
            catalogue,
            tuple(config.code_token_offsets),
            tuple(config.placeholder_token_ids),
            config.vocab_size,
            vllm_config.model_config.max_model_len,
        )
        _SERVICES[vllm_config.model_config.model] = service
        return service

    @property
    def num_levels(self) -> int:
        return len(self.placeholder_token_ids)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt without placeholders: they follow it, and vLLM counts one generated token."""
        return self.max_model_len - self.num_levels - 1

    def code_token_ids(self, codes: list[int]) -> list[int]:
        return [offset + code for offset, code in zip(self.code_token_offsets, codes, strict=True)]


_SERVICES: dict[str, Service] = {}


def service_of(model_config: ModelConfig) -> Service | None:
    """The service of a model in this process; None if it is not a NEZHA model."""
    return _SERVICES.get(model_config.model)
