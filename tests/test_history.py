"""Histories encoded without the tokenizer: the same token ids, or none at all."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.frontend.history import HistoryEncoder, splits_at_codes
from nezha_vllm.frontend.prompts import expand_items
from nezha_vllm.frontend.service import Service
from nezha_vllm.hf.tokenizer import add_semantic_ids, byte_tokenizer

SIZES = [3, 4, 11]
NAMES = ["1", "item", "a_1", "b c", "é", "x<a_1", "<", " "]


def with_beginning() -> PreTrainedTokenizerFast:
    """As Llama 3: a byte-level vocabulary and a token in front of every text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def with_spaces() -> PreTrainedTokenizerFast:
    """As Llama 2: spaces are letters, and one is put in front of every text."""
    letters = {letter: index for index, letter in enumerate(["<unk>", "▁", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {"bytes": byte_tokenizer, "beginning": with_beginning, "spaces": with_spaces}


@cache
def encoder_of(kind: str) -> tuple[Any, Service, HistoryEncoder]:
    tokenizer = KINDS[kind]()
    layout = add_semantic_ids(tokenizer, SIZES)
    codes = np.stack([np.arange(len(NAMES)) % size for size in SIZES], axis=1)
    catalogue = Catalogue.build(NAMES, codes, SIZES)
    settings: Any = SimpleNamespace()
    offsets, placeholders = tuple(layout.code_token_offsets), tuple(layout.placeholder_token_ids)
    service = Service(settings, catalogue, offsets, placeholders, len(tokenizer), 64)
    return tokenizer, service, HistoryEncoder(tokenizer, service, list(tokenizer("")["input_ids"]))


pieces = st.sampled_from(
    [f"<item:{name}>" for name in NAMES]
    + ["<a_0>", "<b_3>", "<c_10>", "<c_1>", "<sp_1>", "<sp_1><sp_2><sp_3>", "<a_3>", "<d_0>", "<a_00>", "<a_٣>"]
    + [
        "<item:unknown>",
        "<item:>",
        "<item:1",
        "item:1",
        " ",
        "\n",
        "<",
        ">",
        "><",
        "text",
        "<s>",
        "<pad>",
        "\ud800",
        "é",
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(pieces, max_size=30).map("".join) | st.lists(st.sampled_from(["<item:1>", "<a_0>", "<c_10>"])).map("".join)
)
def test_what_is_encoded_is_what_the_tokenizer_says(kind, text):
    tokenizer, service, encoder = encoder_of(kind)
    found = encoder.encode(text, service.catalogue)
    if found is None:
        return
    expanded = expand_items(text, service)
    assert found == tokenizer(expanded)["input_ids"]
    assert encoder.text(found) == expanded
    assert len(found) <= service.max_prompt_tokens


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from(["<item:1>", "<item:b c>", "<a_0>", "<c_10>"]), min_size=1, max_size=19).map("".join))
def test_histories_of_known_items_and_codes_need_no_tokenizer(kind, text):
    _, service, encoder = encoder_of(kind)
    assert encoder.encode(text, service.catalogue) is not None


@pytest.mark.parametrize("text", ["<item:unknown>", "<a_3>", "<item:x<a_9>>", "<item:1><item:\ud800>"])
def test_what_is_refused_is_left_to_the_path_with_the_errors(text):
    _, service, encoder = encoder_of("bytes")
    assert encoder.encode(text, service.catalogue) is None
    with pytest.raises(VLLMValidationError):
        expand_items(text, service)


@pytest.mark.parametrize(
    "token",
    [AddedToken("<a_1>x", normalized=False), AddedToken("<a_1><b_2>", normalized=False)],
    ids=["longer", "two at once"],
)
def test_a_token_that_begins_with_a_code_turns_it_off(token):
    tokenizer = byte_tokenizer()
    layout = add_semantic_ids(tokenizer, SIZES)
    names = [f"<{'abc'[level]}_{code}>" for level, size in enumerate(SIZES) for code in range(size)]
    codes = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    assert layout.code_token_offsets[0] == codes["<a_0>"]
    assert splits_at_codes(tokenizer, codes, [])
    tokenizer.add_tokens([token])
    assert not splits_at_codes(tokenizer, codes, [])


def test_codes_in_the_plain_vocabulary_are_left_to_the_tokenizer():
    names = {f"<{'abc'[level]}_{code}>": 0 for level, size in enumerate(SIZES) for code in range(size)}
    assert not splits_at_codes(byte_tokenizer(), names, [])
