"""Prompts in: ``<item:ID>`` becomes codes, placeholders are appended, what cannot be answered is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm.exceptions import VLLMValidationError

from nezha_vllm.catalogue import UnknownItemError
from nezha_vllm.frontend.errors import bad_request, shortened, unknown_item
from nezha_vllm.frontend.service import Service
from nezha_vllm.semantic_id import LEVEL_NAMES, code_token, placeholder_token

ITEM = re.compile(r"<item:([^>]*)>")
CODE = re.compile(r"<([a-z])_(\d+)>")
CHARACTERS_A_TOKEN = 256  # no item of a readable ID has more
EMPTY_PROMPT = "the prompt is empty; send at least one item of the user's history, such as <item:ID>"


def expand_items(text: str, service: Service) -> str:
    """Replace every ``<item:ID>`` by the item's code tokens, drop trailing placeholders, check every code.

    Takes time in proportion to the text, whatever it is. Raises a 400 for an item the catalogue does not hold, for a
    code or level that does not exist, and for a text that is longer than any the model could take.
    """

    def codes(match: re.Match[str]) -> str:
        try:
            found = service.catalogue.codes_of(match[1])
        except UnknownItemError as error:
            raise unknown_item("prompt", error) from None
        return "".join(code_token(level, code) for level, code in enumerate(found))

    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request("prompt", "the prompt has half of a surrogate pair; send valid Unicode") from None
    check_length(text, service)
    _check_codes(text, service)
    placeholders = "".join(placeholder_token(level) for level in range(service.num_levels))
    closed = text.rfind(">") + 1  # behind it, each "<item:" would look for its bracket to the end of the text
    expanded = ITEM.sub(codes, text[:closed]) + text[closed:]
    if "<item:" in expanded:
        raise bad_request("prompt", "the prompt has an item without its closing bracket; write <item:ID>")
    return expanded.rstrip().removesuffix(placeholders)


def check_length(text: str, service: Service) -> None:
    """Raise a 400 for more than the model could take, also where the text is to be truncated behind."""
    most = service.max_prompt_tokens
    for found, limit, what in (
        (len(text), CHARACTERS_A_TOKEN * most, "characters"),
        (text.count("<item:"), most, "items"),
    ):
        if found > limit:
            message = f"the prompt has {found} {what}; send at most {limit}, the latest part of the history"
            raise bad_request("prompt", message)


def _check_codes(text: str, service: Service) -> None:
    sizes = service.catalogue.codec.codebook_sizes
    for match in CODE.finditer(text):
        level = LEVEL_NAMES.index(match[1])
        if level >= len(sizes):
            last = LEVEL_NAMES[len(sizes) - 1]
            raise bad_request(
                "prompt", f"code {shortened(match[0])} names a level that does not exist; levels are a to {last}"
            )
        code = int(match[2]) if len(match[2]) < 10 else sizes[level]  # Python reads no integers of 5,000 digits
        if code >= sizes[level] or match[0] != code_token(level, code):  # <a_07> would be split into letters
            raise bad_request(
                "prompt", f"code {shortened(match[0])} is out of range: level {match[1]} has 0 to {sizes[level] - 1}"
            )


def strip_placeholders(token_ids: Sequence[int], service: Service) -> list[int]:
    """The prompt without the placeholders that a client may have appended itself."""
    tail = len(token_ids) - service.num_levels
    complete = tuple(token_ids[tail:]) == service.placeholder_token_ids if tail >= 0 else False
    return list(token_ids[:tail] if complete else token_ids)


def complete_prompt(token_ids: Sequence[int], service: Service) -> list[int]:
    """History tokens and the L placeholders, nothing else. A prompt that already ends with them is left alone."""
    return append_placeholders(strip_placeholders(token_ids, service), service)


def append_placeholders(history: list[int], service: Service) -> list[int]:
    """The prompt of a history that comes without placeholders.

    Raises a 400 for a prompt that is empty, too long, or has placeholders anywhere but at its end.
    """
    if not history:
        raise bad_request("prompt", EMPTY_PROMPT)
    if not {int, bool}.issuperset(map(type, history)):  # the engine process would die of it
        raise bad_request("prompt", "the prompt has token ids that are no integers; send a list of integers")
    if len(history) > service.max_prompt_tokens:
        raise too_long(len(history), service)
    if not set(service.placeholder_token_ids).isdisjoint(history):
        raise bad_request(
            "prompt", "the prompt has a placeholder before its end; leave placeholders out, the server appends them"
        )
    if not 0 <= min(history) <= max(history) < service.first_item_token:
        raise bad_request("prompt", f"the prompt has token ids outside 0 to {service.first_item_token - 1}")
    return [*history, *service.placeholder_token_ids]


def too_long(length: int | None, service: Service) -> VLLMValidationError:
    """The error for a prompt that does not fit beside its placeholders."""
    has = "is too long" if length is None else f"has {length} tokens"
    return bad_request(
        "prompt",
        f"the prompt {has}; this server takes {service.max_prompt_tokens} (max_model_len {service.max_model_len} less "
        f"{service.num_levels} placeholders and one generated token). Send fewer items of the history, or "
        'truncate_prompt_tokens with truncation_side "left"',
    )
