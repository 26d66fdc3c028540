"""What the API process knows about a served NEZHA model: its catalogue, its limits, its special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.engine.settings import ServerSettings, weights_folder
from nezha_vllm.frontend.seen_rules import SeenRules
from nezha_vllm.generation import FIRST, check_levels
from nezha_vllm.item_tokens import ItemTokens, load_item_tokens

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


@dataclass(frozen=True)
class Service:
    settings: ServerSettings
    catalogue: Catalogue
    code_token_offsets: tuple[int, ...]
    placeholder_token_ids: tuple[int, ...]
    first_item_token: int  # those below it are what clients send
    max_model_len: int
    item_tokens: ItemTokens | None = None
    generation: str = FIRST  # by which the engines know the catalogue
    seen: SeenRules = field(default_factory=SeenRules, compare=False, repr=False)

    @classmethod
    def load(cls, vllm_config: VllmConfig) -> Service:
        """Read and check the checkpoint's catalogue and make it the model's service in this process.

        Raises ``ValueError`` or ``CatalogueError`` naming the file and the remedy.
        """
        settings = ServerSettings.from_vllm(vllm_config)
        catalogue = Catalogue.load(settings.start_folder)
        settings.check_version(catalogue.version)
        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        check_levels(settings.catalogue, catalogue.codec.codebook_sizes, config.codebook_sizes)
        item_tokens = None
        if config.num_item_tokens:
            item_tokens = load_item_tokens(weights_folder(model), config)
            item_tokens.in_prompt(())  # makes its dictionary now, not with the first request
        service = cls(
            settings,
            catalogue,
            tuple(config.code_token_offsets),
            tuple(config.placeholder_token_ids),
            config.first_item_token,
            model.max_model_len,
            item_tokens,
        )
        _SERVICES[model.model] = service
        return service

    def with_catalogue(self, catalogue: Catalogue, generation: str) -> Service:
        return replace(self, catalogue=catalogue, generation=generation, seen=SeenRules())

    @property
    def num_levels(self) -> int:
        return len(self.placeholder_token_ids)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt without placeholders: they follow it, and vLLM counts one generated token."""
        return self.max_model_len - self.num_levels - 1

    def engine_tokens(self, prompt: list[int]) -> list[int]:
        """A complete prompt as the engine reads it: with item tokens, where the model has some."""
        return prompt if self.item_tokens is None else self.item_tokens.in_prompt(prompt)

    def code_token_ids(self, codes: list[int]) -> list[int]:
        return [offset + code for offset, code in zip(self.code_token_offsets, codes, strict=True)]


_SERVICES: dict[str, Service] = {}
_REQUEST: ContextVar[_Request | None] = ContextVar("nezha_request", default=None)


def service_of(model_config: ModelConfig) -> Service | None:
    """The service of a model in this process; None if it is not a NEZHA model."""
    return _SERVICES.get(model_config.model)


def replace_service(model: str, service: Service) -> None:
    """Make it the service of the model for requests that come from now on."""
    _SERVICES[model] = service


class _Request:
    """One request's service, from the moment it is first asked for. Contexts may live on behind the request."""

    service: Service | None = None
    over = False

    def end(self) -> None:
        self.service, self.over = None, True


@contextmanager
def one_request() -> Iterator[None]:
    """What this task, and tasks it starts, do inside is one request, and is answered by one service.

    Checks and rendering of a request are apart in time, and the catalogue may be swapped between them. Inside of
    another's, it is part of that request.
    """
    outer = _REQUEST.get()
    if outer is not None and not outer.over:
        yield
        return
    request = _Request()
    token = _REQUEST.set(request)
    try:
        yield
    finally:
        _REQUEST.reset(token)
        request.end()


def end_request() -> None:
    """Its prompts are rendered, and each has the service now: whoever reads the answer may take hours."""
    request = _REQUEST.get()
    if request is not None:
        request.end()


def service_for_request(current: Service) -> Service:
    """``current``; inside a request what was current when it first came here."""
    request = _REQUEST.get()
    if request is None or request.over:
        return current
    if request.service is None:
        request.service = current
    return request.service
