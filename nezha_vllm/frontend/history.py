"""Histories of nothing but items and codes, straight to token ids: the tokenizer's answer in a tenth of its time."""

from __future__ import annotations

from typing import Any

import numpy as np

from nezha_vllm.catalogue import Catalogue, UnknownItemError
from nezha_vllm.frontend.service import Service
from nezha_vllm.semantic_id import code_token

ITEM = "item:"


class HistoryEncoder:
    """Encodes a text where that is known to be what the tokenizer does, and leaves every other text to it.

    Args:
        tokenizer: of the checkpoint.
        service: the served model's; its catalogue may be swapped later.
        prefix: what the tokenizer puts in front of every text.
    """

    def __init__(self, tokenizer: Any, service: Service, prefix: list[int]) -> None:
        self.prefix, self.longest = prefix, service.max_prompt_tokens
        sizes = service.catalogue.codec.codebook_sizes
        offsets = zip(service.code_token_offsets, sizes, strict=True)
        tokens = {
            code_token(level, code): at + code for level, (at, size) in enumerate(offsets) for code in range(size)
        }
        self._codes = {token[1:-1]: token_id for token, token_id in tokens.items()}
        self._tokens = {token_id: token for token, token_id in tokens.items()}
        self._offsets = np.array(service.code_token_offsets)
        self.applies = splits_at_codes(tokenizer, tokens, prefix)

    def encode(self, text: str, catalogue: Catalogue) -> list[int] | None:
        """Prefix and codes; None if the text has anything but known items and codes, or is too long: ask the tokenizer.

        The tokenizer's path also has the errors, so nothing is refused here.
        """
        if text.count("<") > self.longest:
            return None
        parts = text[1:-1].split("><")
        # as many brackets as parts: there is nothing between the parts, and no bracket inside them
        if (
            not self.applies
            or text[:1] != "<"
            or text[-1:] != ">"
            or not text.count("<") == text.count(">") == len(parts)
        ):
            return None
        items = [part[len(ITEM) :] for part in parts if part.startswith(ITEM)]
        try:
            codes = catalogue.codes[catalogue.rows(items)] + self._offsets
            if len(items) == len(parts):
                token_ids = [*self.prefix, *codes.ravel().tolist()]
            else:
                rows = iter(codes.tolist())
                spans = [next(rows) if part.startswith(ITEM) else [self._codes[part]] for part in parts]
                token_ids = [*self.prefix, *(token_id for span in spans for token_id in span)]
        except (UnknownItemError, KeyError):
            return None
        return token_ids if len(token_ids) <= self.longest else None

    def text(self, token_ids: list[int]) -> str:
        """The codes of an encoded history as text."""
        return "".join(map(self._tokens.__getitem__, token_ids[len(self.prefix) :]))


def splits_at_codes(tokenizer: Any, codes: dict[str, int], prefix: list[int]) -> bool:
    """Whether the tokenizer takes every text made of codes code by code, whatever their order.

    Added tokens that are not normalised are cut out of a text first, at each place the longest that fits: always the
    code, unless another added token begins with one.
    """
    if not getattr(tokenizer, "is_fast", False):
        return False
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    alone = all(code in added and not added[code].normalized and not added[code].single_word for code in codes)
    others = [token for token in added if token not in codes]
    clear = not any(token[:end] in codes for token in others for end in range(len(token)))
    return alone and clear and tokenizer("".join(codes), verbose=False)["input_ids"] == [*prefix, *codes.values()]
