"""Configuration of a NEZHA checkpoint: a backbone's own configuration plus the fields of the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import AutoConfig, LlamaConfig, Qwen3Config

from nezha_vllm.semantic_id import SHARED_ID_POLICIES, SOFTMAX_OVER, SemanticIdCodec

VALIDITY_MODES = ("stepwise", "final")
AUTOREGRESSIVE = "ar"  # the language model: no draft head, a forward pass a code
METHODS = ("nezha", "nezha-1", "nezha-2", "nezha-3", "mtp", AUTOREGRESSIVE)
MAX_LEVELS = 8
MAX_BEAM_WIDTH = 4096


@dataclass
class NezhaFields:
    """Fields that NEZHA adds to a backbone's ``config.json``.

    Attributes:
        codebook_sizes: T_1 … T_L.
        code_token_offsets: per level, the token id of code 0; the level's codes follow it without gaps.
        placeholder_token_ids: token ids of the L placeholders that end every prompt.
        beam_width: K of a request that names none.
        max_beam_width: largest K that a request may ask for, 4,096 at most.
        validity: default validity mode, ``stepwise`` or ``final``.
        softmax: over what a level's probabilities sum to one: ``codes``, all of the level as in the paper, or
            ``catalogue``, those that continue the prefix to an item.
        num_item_tokens: tokens of semantic IDs, the last of the vocabulary, see ``item_tokens``.
        short_histories: whether an item's token stands for all of its codes in a history, or for the last.
        item_score_weight: of the products of h_0 and items beside the log-probabilities of their codes, see
            ``item_scores``; 0 for codes alone, as in the paper. Others need item tokens.
        shared_ids: how items that share a semantic ID come out, see ``sharing.ranked_rows``.
        catalogue: folder of the catalogue, relative to the checkpoint.
        method: ``nezha``, or one that it is compared with, see ``ablations`` and ``hf.language_model``, which are not
            served.
    """

    codebook_sizes: list[int] = field(default_factory=lambda: [256, 256, 256])
    code_token_offsets: list[int] = field(default_factory=list)
    placeholder_token_ids: list[int] = field(default_factory=list)
    beam_width: int = 50
    max_beam_width: int = 512
    validity: str = "stepwise"
    softmax: str = "codes"
    num_item_tokens: int = 0
    short_histories: bool = False
    item_score_weight: float = 0.0
    shared_ids: str = "expand"
    catalogue: str = "catalogue"
    method: str = "nezha"

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def num_reads(self) -> int:
        """Hidden states that predict a target: h_0 and one a placeholder, or h_0 and one a code but the last."""
        return self.num_levels + (self.method != AUTOREGRESSIVE)

    @property
    def first_item_token(self) -> int:
        """The vocabulary without item tokens."""
        return self.vocab_size - self.num_item_tokens  # type: ignore[attr-defined]

    @property
    def codec(self) -> SemanticIdCodec:
        return SemanticIdCodec(self.codebook_sizes)

    def check(self) -> None:
        """Raise ``ValueError`` that says which field of ``config.json`` is wrong and how to mend it."""
        try:
            codec = self.codec
        except ValueError as error:
            raise ValueError(f"config.json: codebook_sizes: {error}") from None
        levels = codec.num_levels
        if levels > MAX_LEVELS:
            raise ValueError(f"config.json: codebook_sizes has {levels} levels, at most {MAX_LEVELS} are supported")
        for name in ("code_token_offsets", "placeholder_token_ids"):
            ids = getattr(self, name)
            if len(ids) != levels:
                raise ValueError(
                    f"config.json: {name} has {len(ids)} entries but codebook_sizes has {levels} levels; "
                    "make the checkpoint anew with `nezha init`"
                )
            if min(ids) < 0:
                raise ValueError(f"config.json: {name} holds a negative token id: {ids}")
        spans = [
            range(start, start + size)
            for start, size in zip(self.code_token_offsets, codec.codebook_sizes, strict=True)
        ]
        spans += [range(token_id, token_id + 1) for token_id in self.placeholder_token_ids]
        spans.sort(key=lambda span: span.start)
        for span, following in pairwise(spans):
            if span.stop > following.start:
                raise ValueError(
                    f"config.json: code_token_offsets and placeholder_token_ids use token id {following.start} twice; "
                    "make the checkpoint anew with `nezha init`"
                )
        if self.num_item_tokens < 0 or spans[-1].stop > self.first_item_token:
            raise ValueError(
                f"config.json: vocab_size is {self.vocab_size}, num_item_tokens {self.num_item_tokens}, "  # type: ignore[attr-defined]
                f"but code_token_offsets or placeholder_token_ids reach token id {spans[-1].stop - 1}"
            )
        if not isinstance(self.short_histories, bool):
            raise ValueError(f"config.json: short_histories is {self.short_histories!r}, must be true or false")
        weight = self.item_score_weight
        if not (isinstance(weight, (int, float)) and 0 <= weight < float("inf")):
            raise ValueError(f"config.json: item_score_weight is {weight!r}, must be a number, 0 or positive")
        if weight and not self.num_item_tokens:
            raise ValueError(f"config.json: item_score_weight is {weight}, but there are no item tokens; set it to 0")
        if self.method not in METHODS:
            raise ValueError(f"config.json: method is {self.method!r}, must be one of {METHODS}")
        if self.validity not in VALIDITY_MODES:
            raise ValueError(f"config.json: validity is {self.validity!r}, must be one of {VALIDITY_MODES}")
        if self.softmax not in SOFTMAX_OVER:
            raise ValueError(f"config.json: softmax is {self.softmax!r}, must be one of {SOFTMAX_OVER}")
        if self.softmax == "catalogue" and self.validity == "final":
            raise ValueError(
                "config.json: validity is 'final', a search over all codes, which no model with a softmax over the "
                "catalogue was trained for; set validity to 'stepwise'"
            )
        if self.shared_ids not in SHARED_ID_POLICIES:
            raise ValueError(f"config.json: shared_ids is {self.shared_ids!r}, must be one of {SHARED_ID_POLICIES}")
        if not 1 <= self.beam_width <= self.max_beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(
                f"config.json: need 1 ≤ beam_width ≤ max_beam_width ≤ {MAX_BEAM_WIDTH}, "
                f"got {self.beam_width} and {self.max_beam_width}"
            )


class NezhaLlamaConfig(NezhaFields, LlamaConfig):
    model_type = "nezha_llama"


class NezhaQwen3Config(NezhaFields, Qwen3Config):
    model_type = "nezha_qwen3"


NezhaConfig = NezhaLlamaConfig | NezhaQwen3Config
CONFIG_CLASSES: dict[str, Any] = {"llama": NezhaLlamaConfig, "qwen3": NezhaQwen3Config}
ARCHITECTURES = {"llama": "NezhaLlamaForCausalLM", "qwen3": "NezhaQwen3ForCausalLM"}


def register_configs() -> None:
    """Let ``AutoConfig`` read our checkpoints. Safe to call more than once."""
    for config_class in CONFIG_CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
