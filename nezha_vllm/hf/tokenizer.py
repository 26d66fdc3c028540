"""Tokenizers with one token a code: made from nothing, or grown from an existing one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nezha_vllm.semantic_id import code_token, placeholder_token

PAD = "<pad>"


@dataclass(frozen=True)
class TokenLayout:
    """Where the added tokens lie; the values of the fields of the same name in ``config.json``."""

    code_token_offsets: list[int]
    placeholder_token_ids: list[int]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes, so that natural language may stand around codes; it adds nothing by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, clean_up_tokenization_spaces=False)


def add_semantic_ids(tokenizer: PreTrainedTokenizerBase, codebook_sizes: Sequence[int]) -> TokenLayout:
    """Add the code tokens, level by level, and the placeholders; the ids of all other tokens stay.

    White space beside a code token belongs to it: ``<a_1> <b_2>`` is two tokens.

    Raises:
        ValueError: the tokenizer already has some of these tokens, in another place.
    """
    levels = [[code_token(level, code) for code in range(size)] for level, size in enumerate(codebook_sizes)]
    placeholders = [placeholder_token(level) for level in range(len(codebook_sizes))]
    for tokens in (*levels, placeholders):
        tokenizer.add_tokens(
            [AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True) for token in tokens],
            special_tokens=True,
        )
    vocabulary = tokenizer.get_vocab()
    layout = TokenLayout(
        [vocabulary[tokens[0]] for tokens in levels],
        [vocabulary[token] for token in placeholders],
    )
    for offset, tokens in zip(layout.code_token_offsets, levels, strict=True):
        if tokenizer.convert_tokens_to_ids(tokens) != list(range(offset, offset + len(tokens))):
            raise ValueError(
                f"the tokenizer already has some of the tokens {tokens[0]} to {tokens[-1]}, in another place; "
                "start from a tokenizer without semantic IDs"
            )
    return layout
