"""Lists of a request are short, or of one kind: looked at before pydantic looks at each entry and writes errors of it.

For 200,000 entries of a wrong type, 1 MB of them, it writes 600,000 errors: 8 s in which the API process answers
nobody, and 1 GB of memory.
"""

from __future__ import annotations

import json
from types import NoneType
from typing import Any

from vllm import envs

from nezha_vllm.frontend.errors import bad_request, shown

FEW = 64  # entries that may be of any kind
MOST = 1_024  # values in a field that is no prompt and no option
LONGEST = 16_384  # characters of such a field, and of all names of fields
PROMPT = "prompt must be a text, a list of token ids, or a list of prompts, each a text or a list of token ids"


def check_shape(body: bytes) -> None:
    """Raise a 400 for a body that is costly to validate. What is no JSON object is left to those behind."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    _check_prompt(fields.pop("prompt", None))
    _check_options(fields.pop("vllm_xargs", None))
    if not isinstance(fields.get("structured_outputs", {}), (dict, NoneType)):  # vLLM takes any other for an object
        raise bad_request("structured_outputs", "structured_outputs has no meaning for catalogue items; leave it out")
    if len(fields) > MOST:
        raise bad_request("body", f"the request has {len(fields)} fields; send at most {MOST}")
    if sum(map(len, fields)) > LONGEST:
        raise bad_request("body", f"the names of the fields have more than {LONGEST} characters")
    for name, value in fields.items():
        _check_size(name, value)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, list) or _kinds(prompt) == {int}:
        return
    most = envs.VLLM_MAX_COMPLETION_PROMPTS
    if len(prompt) > FEW and _kinds(prompt) not in ({str}, {list}):
        raise bad_request("prompt", PROMPT)
    if len(prompt) > most:
        raise bad_request("prompt", f"a request has at most {most} prompts, got {len(prompt)}; send several requests")
    for one in prompt:
        if isinstance(one, list) and len(prompt) + len(one) > FEW and _kinds(one) != {int}:
            raise bad_request("prompt", PROMPT)


def _check_options(options: Any) -> None:
    if not isinstance(options, dict):
        return _check_size("vllm_xargs", options)
    if len(options) > FEW:
        raise bad_request("vllm_xargs", f"vllm_xargs has {len(options)} options; send at most {FEW}")
    for name, value in options.items():
        if isinstance(value, list) and len(value) > FEW and not _kinds(value) <= {str, int}:
            raise bad_request(name, f"{shown(name)} must be a list of texts or integers")
        if not isinstance(value, list):
            _check_size(name, value)


def _kinds(values: list[Any]) -> set[type]:
    return set(map(type, values))


def _check_size(name: str, value: Any) -> None:
    """Of the model's name, for instance, a 404 would have all the megabytes that were sent."""
    count, length, waiting = 0, 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            length += len(one)
        if isinstance(one, dict):
            length += sum(map(len, one))
        if isinstance(one, (list, dict)):
            count += len(one)
            waiting.extend(one.values() if isinstance(one, dict) else one)
        if count > MOST:
            raise bad_request(name, f"{shown(name)} has more than {MOST} values; send fewer")
        if length > LONGEST:
            raise bad_request(name, f"{shown(name)} has more than {LONGEST} characters; send fewer")
