"""``/v1/completions``: what HTTP adds to a request and to its answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from nezha_vllm.frontend.answers import RecommendedItem
from nezha_vllm.frontend.errors import bad_request
from nezha_vllm.frontend.options import OPTIONS, check_search
from nezha_vllm.frontend.prompts import EMPTY_PROMPT
from nezha_vllm.frontend.rules import LISTS
from nezha_vllm.frontend.service import Service

MAX_ITEMS = 65_536
MAX_ENTRIES = 262_144
CHAT_REFUSAL = (
    "chat and responses are not offered by a generative recommender: send the user's history to /v1/completions, "
    'for example {"prompt": "<item:ID><item:ID>", "n": 10}'
)


def prepare(request: Any, service: Service) -> Any:
    """A ``CompletionRequest`` in terms of a beam search over items. Raises a 400 for what has no meaning there.

    ``use_beam_search`` asks vLLM for n beams and returns them all: so does this. Temperature has no effect on a
    ranking, yet vLLM refuses temperature 0 with n > 1, so it is dropped; one token is all the engine has to generate.
    """
    for name in ("echo", "suffix", "prompt_embeds"):
        if getattr(request, name, None):
            raise bad_request(name, f"{name} does not work with catalogue items; leave it out")
    for name in OPTIONS:  # vLLM ignores fields it does not know, and a rule that is ignored shows what it forbids
        if name in (request.model_extra or {}):
            raise bad_request(name, f"{name} is an option of the search; send it inside vllm_xargs")
    if request.prompt in (None, "", []):
        raise bad_request("prompt", EMPTY_PROMPT)
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_request("response_format", "response_format does not work with catalogue items; leave it out")
    options = dict(request.vllm_xargs or {})
    if request.use_beam_search:
        options.setdefault("beam_width", request.n)
    check_search(service, request.n, options)
    check_batch(request.prompt, request.n, options)
    try:
        str(request.request_id).encode()
    except UnicodeEncodeError:
        raise bad_request("request_id", "request_id has half of a surrogate pair; send valid Unicode") from None
    changes = {"use_beam_search": False, "temperature": None, "max_tokens": 1, "min_tokens": 0, "stream_interval": None}
    known = {name: value for name, value in changes.items() if name in type(request).model_fields}
    return request.model_copy(update={**known, "vllm_xargs": options or None})


def num_prompts(prompt: Any) -> int:
    """How many a request has; a list of token ids is one."""
    return len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1


def check_batch(prompt: Any, n: int, options: Mapping[str, Any]) -> None:
    """Raise a 400 for more than one request is to hold of what each of its prompts has. vLLM limits the prompts."""
    prompts = num_prompts(prompt)
    if prompts * n > MAX_ITEMS:
        raise bad_request(
            "n",
            f"{prompts} prompts with {n} items each are over the {MAX_ITEMS} items of one response; "
            "send several requests or a lower n",
        )
    for name in LISTS:
        entries = len(options[name]) if isinstance(options.get(name), list) else 0
        if prompts > 1 and prompts * entries > MAX_ENTRIES:  # each prompt has rules of its own
            raise bad_request(
                name,
                f"{prompts} prompts with {entries} entries of {name} are over {MAX_ENTRIES}; send several requests, or "
                "publish the list as a segment",
            )


def extra_fields(item: RecommendedItem) -> dict[str, Any]:
    """Fields of a choice beyond OpenAI's; clients that do not know them keep them."""
    return {
        "score": item.cumulative_logprob,
        "semantic_id": list(item.semantic_id),
        "catalogue_version": item.catalogue_version,
    }


def annotate_response(response: Any, results: Sequence[Any], n: int) -> Any:
    """Add scores to a ``CompletionResponse``; choice i of prompt p has index p · n + i even if some are missing."""
    items = [(prompt, item) for prompt, result in enumerate(results) for item in result.outputs]
    for choice, (prompt, item) in zip(response.choices, items, strict=True):
        choice.index = prompt * n + item.index
        if isinstance(item, RecommendedItem):  # not so if the request was aborted
            for name, value in extra_fields(item).items():
                setattr(choice, name, value)
    response.nezha = summaries(results)
    return response


def summaries(results: Sequence[Any]) -> list[dict[str, Any] | None]:
    """What became of each prompt, as JSON; None for one that was aborted."""
    found = [getattr(result, "nezha", None) for result in results]
    return [vars(summary) if summary is not None else None for summary in found]


async def annotate_stream(lines: AsyncIterator[str], results: dict[int, Any], n: int) -> AsyncIterator[str]:
    """Add the same fields to server-sent events; ``results`` is filled while the stream runs, keyed by prompt.

    A choice brings the summary of its prompt along. If prompts got no item, one event without choices tells all.
    """
    async for line in lines:
        body = line.removeprefix("data: ").strip()
        if body == "[DONE]" and any(not result.outputs for result in results.values()):
            told = summaries([results[prompt] for prompt in sorted(results)])
            yield f"data: {json.dumps({'object': 'text_completion', 'choices': [], 'nezha': told})}\n\n"
        if not body.startswith("{"):
            yield line
            continue
        chunk = json.loads(body)
        for choice in chunk.get("choices", []):
            prompt, rank = divmod(choice["index"], n)
            item = results[prompt].outputs[rank]
            if isinstance(item, RecommendedItem):
                choice.update(extra_fields(item))
            chunk["nezha"] = summaries([results[prompt]])
        yield f"data: {json.dumps(chunk)}\n\n"
