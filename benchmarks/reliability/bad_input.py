"""Requests that no client should send, and the good ones that they differ from in one thing or in many.

Hypothesis strategies of request bodies for ``POST /v1/completions``: prompts by the grammar of ``<item:ID>`` and codes,
``vllm_xargs`` with every option of ours, vLLM's fields, and bytes that are no JSON.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Sent = tuple[str, bytes]  # path and body of a request
COMPLETIONS, INVOCATIONS = "/v1/completions", "/invocations"  # the latter is Amazon SageMaker's name for the former

HUGE = (0, -1, 2**31, 2**32, -(2**63), 2**63 - 1, 2**64, 10**30, 10**400, -(10**400))
ODD_NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, -0.0, 0.5, 1e15)
ODD_TEXTS = ("", " ", "\0", "\ud800", "\ufeff", "nan", "true", "1", "-1", "1e9", "../../etc/passwd", "a" * 10_000, "٣")
LIST_LENGTHS = (0, 1, 2, 100, 65_535, 65_536, 65_537, 100_000)


@dataclass(frozen=True)
class Known:
    """What a good request to a server consists of: its items, segments, levels and limits."""

    items: tuple[str, ...]
    segments: tuple[str, ...]
    codebook_sizes: tuple[int, ...]
    vocab_size: int
    max_beam_width: int


def json_values() -> SearchStrategy[Any]:
    """Any JSON value, of any type, and numbers that JSON has no word for."""
    leaves = (
        st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE) | st.floats() | st.sampled_from(ODD_NUMBERS)
        | st.text(max_size=20) | st.sampled_from(ODD_TEXTS)
    )  # fmt: skip
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    )


def prompts(known: Known) -> SearchStrategy[Any]:
    """Texts by the grammar and around it, token ids in and out of range, batches of them, and other types."""
    text, tokens = texts(known), token_ids(known)
    return st.one_of(text, text, tokens, st.lists(text | tokens, max_size=5), json_values())


def texts(known: Known) -> SearchStrategy[str]:
    """Histories of whole, broken and foreign parts, from nothing to more than a prompt may have."""
    levels = string.ascii_lowercase
    code = st.builds(lambda level, code: f"<{level}_{code}>", st.sampled_from(levels), st.integers(-2, 300))
    odd_code = st.builds(
        lambda level, code: f"<{level}_{code}>", st.sampled_from(levels + "A~é"), st.sampled_from(("", "9" * 5000, "٣"))
    )
    semantic_id = st.tuples(*(st.integers(0, size - 1) for size in known.codebook_sizes)).map(
        lambda codes: "".join(f"<{levels[level]}_{code}>" for level, code in enumerate(codes))
    )
    odd_item = (st.text(max_size=12) | st.sampled_from(ODD_TEXTS)).map(lambda name: f"<item:{name}>")
    broken = st.sampled_from(
        (
            "<",
            ">",
            "<item:",
            "<item>",
            "<item:<item:1>>",
            "<ITEM:1>",
            "<sp_1>",
            "<sp_99>",
            "</s>",
            "<unk>",
            "<a_1><b_2>",
        )
    )
    placeholders = st.just("".join(f"<sp_{level + 1}>" for level in range(len(known.codebook_sizes))))
    part = st.one_of(
        _items(known), _items(known), semantic_id, code, odd_code, odd_item, broken, placeholders, st.text(max_size=8)
    )
    joined = st.lists(part, max_size=12).map("".join)
    history = st.lists(_items(known) | semantic_id, min_size=1, max_size=12).map("".join)
    long = st.builds(lambda item, count: item * count, part, st.sampled_from((100, 339, 340, 341, 1_000, 20_000)))
    return st.one_of(history, history, history, joined, joined, st.builds(str.__add__, long, history) | long)


def token_ids(known: Known) -> SearchStrategy[Any]:
    """Lists of integers in the vocabulary; sometimes of something else, or longer than a prompt may be."""
    good = st.integers(0, known.vocab_size - 1)
    odd = st.sampled_from((*HUGE, *ODD_NUMBERS, None, True, "1", [1])) | st.integers(-3, known.vocab_size + 3)
    mixed = st.builds(lambda *parts: [*chain(*parts)], st.lists(good, max_size=6), st.lists(odd, max_size=2))
    long = st.builds(lambda token, count: [token] * count, good, st.sampled_from((1_019, 1_020, 1_021, 50_000)))
    return st.one_of(st.lists(good, min_size=1, max_size=40), mixed, mixed, long)


def options(known: Known) -> SearchStrategy[Any]:
    """``vllm_xargs``: every option of ours, right, almost right or wrong, in any combination."""
    number = st.one_of(st.integers(1, 40), st.integers(-1, known.max_beam_width + 1), st.sampled_from(HUGE))
    flag = st.booleans() | st.sampled_from((0, 1, "true", "perhaps", None))
    score = st.floats(-30, 0) | st.sampled_from(ODD_NUMBERS) | st.integers()
    items = _names(known.items)
    right = {
        "beam_width": number,
        "validity": st.sampled_from(("stepwise", "final", "STEPWISE", "")),
        "exclude_items": items,
        "allow_items": items,
        "exclude_history": flag,
        "segments": _names(known.segments),
        "exclude_segments": _names(known.segments),
        "min_score": score,
        "max_per_id": number,
    }
    values = {name: st.one_of(value, value, value, json_values()) for name, value in right.items()}
    some = st.lists(st.sampled_from(sorted(values)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: values[name] for name in names})
    )
    foreign = st.dictionaries(
        st.sampled_from(("nezha", "beam-width", "catalogue_version", "generation", "")) | st.text(max_size=8),
        json_values(),
        min_size=1,
        max_size=2,
    )
    both = st.builds(lambda ours, others: ours | others, some, foreign)
    return st.one_of(some, some, some, some, some, both, json_values())


def bodies(known: Known) -> SearchStrategy[dict[str, Any]]:
    """Objects with a prompt, options of ours and some of vLLM's fields."""
    good = st.lists(_items(known), min_size=1, max_size=8).map("".join)
    flag = st.booleans() | st.none() | st.sampled_from((0, 1, "yes"))
    fields = {
        "vllm_xargs": options(known),
        "n": st.one_of(st.integers(1, 12), st.integers(-2, known.max_beam_width + 2), st.sampled_from(HUGE)),
        "use_beam_search": flag,
        "stream": flag,
        "logprobs": st.integers(-1, 30) | st.sampled_from(HUGE),
        "echo": flag,
        "model": st.none() | st.text(max_size=8),
        "temperature": st.floats() | st.integers(),
        "max_tokens": st.none() | st.integers() | st.sampled_from(HUGE),
        "truncate_prompt_tokens": st.integers(-2, 2_000) | st.sampled_from(HUGE),
        "truncation_side": st.sampled_from(("left", "right", "middle")),
        "stream_options": st.fixed_dictionaries({"include_usage": flag}) | json_values(),
        "cache_salt": st.text(max_size=8),
        "priority": st.sampled_from((0, *HUGE)),
        "request_id": st.text(max_size=8),
        "user": st.text(max_size=8),
    }
    other = {name: st.one_of(value, value, value, json_values()) for name, value in fields.items()}
    extra = st.lists(st.sampled_from(sorted(other)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: other[name] for name in names})
    )
    of_options = st.builds(
        lambda prompt, xargs, more: {"prompt": prompt, "vllm_xargs": xargs} | more, good, options(known), extra
    )
    of_prompts = st.builds(lambda prompt, more: {"prompt": prompt} | more, prompts(known), extra)
    streamed = of_options.map(lambda body: body | {"stream": True})
    return st.one_of(of_options, of_options, of_prompts, of_prompts, streamed)


@cache
def by_grammar(known: Known) -> SearchStrategy[Sent]:
    """Such objects as JSON, with and without escapes."""
    paths = st.integers(0, 9).map(lambda number: COMPLETIONS if number else INVOCATIONS)
    return st.tuples(paths, st.builds(encode, bodies(known), st.booleans()))


def encode(body: Any, escaped: bool = True) -> bytes:
    """As JSON, also what JSON cannot hold: NaN, and halves of surrogate pairs as bytes that are no UTF-8."""
    return json.dumps(body, ensure_ascii=escaped).encode("utf-8", "surrogatepass")


@cache
def damaged(known: Known) -> SearchStrategy[Sent]:
    """Bytes that were JSON once: cut, overwritten, deeply nested, with numbers of thousands of digits."""
    good = st.lists(_items(known), min_size=1, max_size=4).map(lambda items: encode({"prompt": "".join(items), "n": 2}))
    cut = st.builds(lambda body, at: body[: at % len(body)], good, st.integers(0, 200))
    overwritten = st.builds(
        lambda body, at, new: body[: at % len(body)] + new + body[at % len(body) + len(new) :],
        good,
        st.integers(0, 200),
        st.binary(min_size=1, max_size=6),
    )
    many = st.builds(
        lambda field, value, count: (
            f'{{"prompt": "<item:{known.items[0]}>", {field % ",".join([value] * count)}}}'.encode()
        ),
        st.sampled_from(('"prompt": [%s]', '"vllm_xargs": {"exclude_items": [%s]}', '"stop": [%s]', '"other": [[%s]]')),
        st.sampled_from(("1.5", "{}", "null", '"x"', "[1]", "true", "1")),
        st.sampled_from((60, 70, 1_000, 1_100, 30_000)),
    )
    depth = st.sampled_from((50, 900, 1_100, 5_000, 100_000))
    nested = st.builds(
        lambda field, deep, pair: (
            f'{{"prompt": "<item:{known.items[0]}>", {field}: {pair[0] * deep}1{pair[1] * deep}}}'.encode()
        ),
        st.sampled_from(('"vllm_xargs"', '"prompt"', '"other"', '"vllm_xargs": {"exclude_items": 1}, "stop"')),
        depth,
        st.sampled_from((("[", "]"), ('{"a":', "}"))),
    )
    digits = st.builds(
        lambda field, count: f'{{"prompt": "<item:{known.items[0]}>", "{field}": {"9" * count}}}'.encode(),
        st.sampled_from(("n", "seed", "max_tokens", "top_p", "other")),
        st.sampled_from((20, 400, 4_300, 4_301, 100_000)),
    )
    bytes_ = st.one_of(cut, overwritten, many, nested, digits, st.binary(max_size=40), st.builds(encode, json_values()))
    return bytes_.map(lambda body: (COMPLETIONS, body))


def _items(known: Known) -> SearchStrategy[str]:
    return st.sampled_from(known.items).map(lambda item: f"<item:{item}>")


def _names(good: tuple[str, ...]) -> SearchStrategy[Any]:
    """Lists of names of the catalogue, of others, of other types, and long ones."""
    if not good:
        good = ("none",)
    right = st.lists(st.sampled_from(good), max_size=6)
    mixed = st.lists(st.sampled_from(good) | st.text(max_size=8) | st.integers() | json_values(), max_size=4)
    long = st.builds(
        lambda at, count: [good[(at + number) % len(good)] for number in range(count)],
        st.integers(0, len(good)),
        st.sampled_from(LIST_LENGTHS),
    )
    return st.integers(0, 39).flatmap(lambda kind: long if kind == 0 else mixed if kind < 10 else right)
