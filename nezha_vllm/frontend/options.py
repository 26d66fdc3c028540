"""Request options: what a client may ask of a search, and what of vLLM's own options cannot be honoured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from nezha_vllm.config import VALIDITY_MODES
from nezha_vllm.engine.draft_stage import REQUEST_KEY
from nezha_vllm.frontend.errors import bad_request, shown
from nezha_vllm.frontend.rules import NO_RULES, RULES, Rules, read_rules
from nezha_vllm.frontend.service import Service

OPTIONS = ("beam_width", "validity", *RULES)
PLAN = "nezha_plan"  # a plain attribute of SamplingParams: it stays in this process
PROMPT = "nezha_prompt"  # another: the prompt without item tokens, which no client may send
NO_SAMPLING = "{} has no meaning for catalogue items, which are ranked and not sampled; leave it out"


@dataclass(frozen=True)
class Plan:
    """One request, checked: n items out of ``beam_width`` beams.

    ``as_choices`` is False for a request that makes its response from the columns of an ``Answer``.
    """

    service: Service
    n: int
    beam_width: int
    validity: str
    with_logprobs: bool
    rules: Rules = NO_RULES
    as_choices: bool = True

    def search(self) -> dict[str, Any]:
        """What the engine needs of it (``engine.draft_stage.Search``). n items lie on n semantic IDs at most."""
        search: dict[str, Any] = {
            "num_ids": self.n,
            "beam_width": self.beam_width,
            "stepwise": self.validity == "stepwise",
            "generation": self.service.generation,
        }
        eligible = self.rules.eligible
        if eligible is None:
            return search
        if eligible.only or len(eligible.positions):
            search |= {"only": eligible.only, "positions": eligible.positions.tobytes()}
        if eligible.combination is not None:
            search |= {"all_of": eligible.combination.all_of, "none_of": eligible.combination.none_of}
        return search


def engine_params(plan: Plan, output_kind: RequestOutputKind) -> SamplingParams:
    """The little that the engine needs of a request; the plan comes along as the attribute ``PLAN``."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=0,  # opens the channel that the payload travels through
        detokenize=False,
        output_kind=output_kind,
        extra_args={REQUEST_KEY: plan.search()},
        skip_clone=True,
    )
    setattr(params, PLAN, plan)
    return params


def make_plan(service: Service, params: SamplingParams, history: Sequence[int] = ()) -> Plan:
    """Check ``SamplingParams`` against the service; ``history`` are the prompt's token ids.

    Raises a 400 that names the parameter.
    """
    refuse_sampling_options(params)
    options = params.extra_args or {}
    beam_width, validity = check_search(service, params.n, options)
    rules = read_rules(service, options, history)
    return Plan(service, params.n, beam_width, validity, params.logprobs is not None, rules)


def check_search(service: Service, n: int, options: Mapping[str, Any]) -> tuple[int, str]:
    """Check the number of items and the options in ``vllm_xargs`` (``extra_args`` offline). Raises a 400.

    Returns the beam width and the validity mode.
    """
    for name in options:
        if name not in OPTIONS:
            raise bad_request(name, f"{shown(name)} is not an option; vllm_xargs takes {', '.join(OPTIONS)}")
    beam_width = options.get("beam_width", service.settings.beam_width)
    if type(beam_width) is not int or beam_width < 1:
        raise bad_request("beam_width", f"beam_width must be a whole number of at least 1, got {shown(beam_width)}")
    limit = service.settings.max_beam_width
    if beam_width > limit:
        raise bad_request(
            "beam_width", f"{shown(beam_width)} is over this server's maximum beam_width; send at most {limit}"
        )
    if n < 1:
        raise bad_request("n", f"n must be at least 1, got {shown(n)}")
    if n > beam_width:
        raise bad_request(
            "n", f"{shown(n)} items were asked for but beam_width is {beam_width}; lower n or raise beam_width"
        )
    validity = options.get("validity", service.settings.validity)
    if validity not in VALIDITY_MODES:
        raise bad_request("validity", f"validity must be one of {', '.join(VALIDITY_MODES)}, got {shown(validity)}")
    return beam_width, validity


def refuse_sampling_options(params: SamplingParams) -> None:
    """Refuse what would be silently ignored though its sender counts on it.

    Temperature, top-p, top-k, min-p, seed and max_tokens are accepted and have no effect: clients send them by default.
    """
    neutral = {
        "presence_penalty": (None, 0, 0.0),
        "frequency_penalty": (None, 0, 0.0),
        "repetition_penalty": (None, 1, 1.0),
        "stop": (None, "", []),
        "stop_token_ids": (None, []),
        "bad_words": (None, []),
        "logit_bias": (None, {}),
        "allowed_token_ids": (None, []),
        "structured_outputs": (None,),
        "prompt_logprobs": (None,),
        "logprob_token_ids": (None, []),
        "logits_processors": (None, []),
    }
    for name, harmless in neutral.items():
        value = getattr(params, name, None)
        if value not in harmless:
            raise bad_request(name, NO_SAMPLING.format(name))
