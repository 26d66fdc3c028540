"""Tokens of semantic IDs: in a history, the last code of an item that training knew gives way to a token of its own.

Three codes name an item by what it shares with others; what users did with this very item is learnt by a vector of its
own (see ``training.item_embeddings``). The prompt is as long as before; with ``short_histories`` the token stands for
all codes, and it is shorter. An item that training did not know keeps its codes. Item tokens are the last ids of the
vocabulary, in the order of their semantic IDs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nezha_vllm.semantic_id import SemanticIdCodec

if TYPE_CHECKING:
    from nezha_vllm.config import NezhaConfig

KEYS = "item_token_keys"  # among a checkpoint's weights


class ItemTokens:
    """Which semantic IDs have a token, and where it stands in a prompt.

    Args:
        keys: int64 [I], ascending: the semantic IDs that have one.
        first: token id of the first.
        offsets: token id of code 0, a level.
        short: a token stands for all codes of its item in a history, not for the last.
    """

    def __init__(
        self, keys: np.ndarray, first: int, codec: SemanticIdCodec, offsets: Sequence[int], short: bool = False
    ) -> None:
        self.keys, self.first, self.codec = np.ascontiguousarray(keys, np.int64), first, codec
        self.offsets, self.short = np.asarray(offsets, np.int64), short

    @classmethod
    def of(cls, keys: np.ndarray, config: NezhaConfig) -> ItemTokens:
        """Those of a model with this configuration."""
        offsets, short = config.code_token_offsets, config.short_histories
        return cls(keys, config.first_item_token, config.codec, offsets, short)

    def __len__(self) -> int:
        return len(self.keys)

    def put(self, token_ids: np.ndarray) -> np.ndarray:
        """Code tokens of items [..., L] → the same with item tokens in the last column, where there are some."""
        keys = self.codec.key(token_ids - self.offsets)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        found = token_ids.copy()
        found[..., -1] = np.where(self.keys[at] == keys, self.first + at, token_ids[..., -1])
        return found

    def history(self, token_ids: np.ndarray) -> np.ndarray:
        """Code tokens of items [items, L] → the tokens of that history, oldest first, int64 [tokens]."""
        found = self.put(token_ids)
        if not self.short:
            return found.ravel()
        shown = np.ones(found.shape, bool)
        shown[:, :-1] = found[:, -1:] < self.first
        return found[shown]

    def in_prompt(self, token_ids: Sequence[int]) -> list[int]:
        """The same anywhere in a prompt, wherever all codes of an item stand side by side.

        By look-ups in a dictionary: 8 to 23 µs for 128 tokens, of which NumPy's calls would take 60.
        """
        levels = len(self.offsets)
        items = zip(*(token_ids[level:] for level in range(levels)), strict=False)
        if not self.short:
            return [*token_ids[: levels - 1], *map(self._by_codes.get, items, token_ids[levels - 1 :])]
        names, found, at = [*map(self._by_codes.get, items)], [], 0
        while at < len(names):
            name = names[at]
            found.append(token_ids[at] if name is None else name)
            at += 1 if name is None else levels
        return [*found, *token_ids[at:]]

    @cached_property
    def _by_codes(self) -> dict[tuple[int, ...], int]:
        tokens = (self.codec.codes_of_key(self.keys) + self.offsets).tolist()
        return {tuple(codes): self.first + number for number, codes in enumerate(tokens)}


def load_item_tokens(folder: str | os.PathLike[str], config: NezhaConfig) -> ItemTokens:
    """Those of a checkpoint folder. Raises ``ValueError`` where config.json counts other ones than the weights hold."""
    from safetensors import safe_open

    folder = Path(folder)
    index, file = folder / "model.safetensors.index.json", "model.safetensors"
    if index.is_file():
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(KEYS)
    keys = np.empty(0, np.int64)
    if file:
        with safe_open(folder / file, "np") as weights:
            keys = weights.get_tensor(KEYS) if KEYS in weights.keys() else keys  # noqa: SIM118
    return checked(keys, config, str(folder))


def checked(keys: np.ndarray, config: NezhaConfig, where: str) -> ItemTokens:
    """Raises ``ValueError`` for keys that cannot be those of the configuration."""
    ascending = len(keys) > 0 and bool((np.diff(keys) > 0).all()) and keys[0] >= 0 and keys[-1] < config.codec.capacity
    if len(keys) != config.num_item_tokens or not ascending:
        raise ValueError(
            f"{where}: {KEYS} in model.safetensors are not the {config.num_item_tokens} semantic IDs that config.json "
            "counts; keep both files of one checkpoint together, or train it anew"
        )
    return ItemTokens.of(keys, config)
