"""The bytes of a ``CompletionResponse``, straight from the columns of an answer."""

from __future__ import annotations

import msgspec
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.openai.completion.serving import UsageInfo

from nezha_vllm.frontend.answers import Answer


class ResponseBody:
    """Fields that are the same in all responses of a server come from vLLM's own models, so no version lacks any.

    A choice costs 1 µs; a model object a choice and its dump cost 20.
    """

    def __init__(self, model: str, system_fingerprint: str | None) -> None:
        choice = CompletionResponseChoice(index=0, text="", finish_reason="stop")
        usage = UsageInfo(prompt_tokens=0, completion_tokens=0, total_tokens=0)
        response = CompletionResponse(id="", created=0, model=model, choices=[choice], usage=usage)
        if "system_fingerprint" in CompletionResponse.model_fields:
            response.system_fingerprint = system_fingerprint
        self.response = response.model_dump()
        self.choice = self.response["choices"][0]
        self.usage = self.response["usage"]

    def encode(self, request_id: str, created: int, answer: Answer, usage: UsageInfo) -> bytes:
        """One response for one prompt."""
        constant, version = self.choice, answer.summary.catalogue_version
        columns = zip(answer.item_ids, answer.scores, answer.codes, strict=True)
        choices = [
            {
                **constant,
                "index": index,
                "text": item_id,
                "score": score,
                "semantic_id": codes,
                "catalogue_version": version,
            }
            for index, (item_id, score, codes) in enumerate(columns)
        ]
        counts = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        }
        return msgspec.json.encode(
            {
                **self.response,
                "id": request_id,
                "created": created,
                "choices": choices,
                "usage": {**self.usage, **counts},
                "nezha": [vars(answer.summary)],
            }
        )
