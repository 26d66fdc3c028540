"""``LLM.beam_search``: vLLM's offline beam search interface over our single prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.entrypoints.generate.beam_search.utils import BeamSearchOutput, BeamSearchSequence

from nezha_vllm.frontend.errors import bad_request


def beam_search(
    llm: Any, prompts: Sequence[Any], params: Any, lora_request: Any = None, use_tqdm: bool = False, *_: Any, **__: Any
) -> list[BeamSearchOutput]:
    """Sequences of L code tokens, best first; ``text`` is the item's ID and ``cum_logprob`` its score."""
    if lora_request is not None:
        raise bad_request("lora_request", "lora_request does not work with a NEZHA model; leave it out")
    if getattr(params, "structured_outputs", None) is not None:
        raise bad_request("structured_outputs", "structured_outputs do not work with catalogue items; leave it out")
    width = params.beam_width
    sampling = SamplingParams(n=width, logprobs=0, extra_args={"beam_width": width})
    results = llm.generate(prompts, sampling, use_tqdm=use_tqdm)
    return [BeamSearchOutput(sequences=[_sequence(result, item) for item in result.outputs]) for result in results]


def _sequence(result: Any, item: Any) -> BeamSearchSequence:
    return BeamSearchSequence(
        orig_prompt={"type": "token", "prompt_token_ids": result.prompt_token_ids},
        tokens=[*result.prompt_token_ids, *item.token_ids],
        logprobs=item.logprobs,
        cum_logprob=item.cumulative_logprob,
        text=item.text,
        finish_reason=item.finish_reason,
    )
