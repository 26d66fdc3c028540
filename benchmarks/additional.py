"""The ``nezha`` options of ``--additional-config``, read out of vLLM's arguments and put into them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

FLAG = "--additional-config"


def nezha_options(vllm_args: Sequence[str]) -> dict[str, Any]:
    """Raises ``ValueError`` where it is written in a way that is not read here."""
    return _split(vllm_args)[0].get("nezha", {})


def with_nezha(vllm_args: Sequence[str], **options: Any) -> list[str]:
    """The arguments with these options beside those they have: of two ``--additional-config`` vLLM takes the last.

    Ends the program, and says why, where they have one of these options, or are not read here.
    """
    try:
        given, others = _split(vllm_args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    nezha = given.get("nezha", {})
    if taken := sorted(nezha.keys() & options.keys()):
        raise SystemExit(f"{FLAG}: {', '.join(taken)} is set by this script, leave it out")
    return [FLAG, json.dumps({**given, "nezha": {**nezha, **options}}), *others]


def _split(vllm_args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the last of them says, and the other arguments."""
    found: Any = {}
    others, words = [], iter(vllm_args)
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag.startswith(f"{FLAG}."):
            raise ValueError(f"{word}: write it as one object, {FLAG} '{{\"nezha\": {{…}}}}'")
        if flag != FLAG:
            others.append(word)
            continue
        text = value if equals else next(words, "")
        try:
            found = json.loads(text)
        except ValueError:
            raise ValueError(f"{FLAG}: {text!r} is not JSON") from None
        if not isinstance(found, dict) or not isinstance(found.get("nezha", {}), dict):
            raise ValueError(f"{FLAG}: it and its nezha must be objects, not {text}")
    return found, others
