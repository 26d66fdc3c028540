"""Prompts as token ids: the tokenizer's prefix, L tokens an item or one, L placeholders, nothing behind them.

Those of the language model end with the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nezha_vllm.config import AUTOREGRESSIVE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.config import NezhaConfig
    from nezha_vllm.item_tokens import ItemTokens


def code_token_ids(config: NezhaConfig, codes: Any) -> np.ndarray:
    """Codes [..., L] → token ids, int64 [..., L]."""
    return np.asarray(codes, np.int64) + np.asarray(config.code_token_offsets, np.int64)


def prefix_token_ids(tokenizer: PreTrainedTokenizerBase, config: NezhaConfig) -> list[int]:
    """What the tokenizer puts in front of every prompt, such as a beginning-of-sequence token; often nothing.

    Raises ``ValueError`` for a tokenizer without the code tokens, or one that puts something behind the prompt.
    """
    first_code = config.code_token_offsets[0]
    ids = tokenizer(tokenizer.convert_ids_to_tokens(first_code))["input_ids"]
    if first_code not in ids:
        raise ValueError(
            f"the tokenizer does not know the code token with id {first_code} that config.json names; "
            "make the checkpoint anew with `nezha init` or `nezha train`"
        )
    if ids[-1] != first_code:
        raise ValueError(
            "the tokenizer puts tokens behind every prompt, where only placeholders may stand; "
            "set add_eos_token to false in its tokenizer_config.json"
        )
    return ids[: ids.index(first_code)]


def prompt_token_ids(
    config: NezhaConfig, history_codes: Any, prefix: Sequence[int] = (), item_tokens: ItemTokens | None = None
) -> list[int]:
    """Token ids of one request from the codes [items, L] of its history, oldest item first.

    ``item_tokens``: the model's, which take the place of last codes, or of all.
    """
    codes = np.asarray(history_codes, np.int64).reshape(-1, config.num_levels)
    if len(codes) == 0:
        raise ValueError("a history needs at least one item")
    tokens = code_token_ids(config, codes)
    tokens = tokens.ravel() if item_tokens is None else item_tokens.history(tokens)
    history = [*prefix, *tokens.tolist()]
    return history if config.method == AUTOREGRESSIVE else [*history, *config.placeholder_token_ids]


def history_prompts(
    config: NezhaConfig,
    catalogue: Catalogue,
    histories: Sequence[Sequence[str]],
    prefix: Sequence[int] = (),
    item_tokens: ItemTokens | None = None,
) -> list[list[int]]:
    """Token ids of one request a history of item IDs. The items of all are looked up at once: a tenth of the time.

    Raises:
        ValueError: an empty history.
        UnknownItemError: an item that the catalogue does not hold.
    """
    codes = catalogue.codes[catalogue.rows([item for items in histories for item in items])]
    parts = np.split(codes, np.cumsum([len(items) for items in histories])[:-1])
    return [prompt_token_ids(config, part, prefix, item_tokens) for part in parts]
