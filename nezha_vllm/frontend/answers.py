"""Answers out: one engine output becomes n choices, one catalogue item each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from nezha_vllm.frontend import metrics
from nezha_vllm.frontend.errors import unavailable
from nezha_vllm.frontend.options import Plan
from nezha_vllm.payload import GONE, RankedIds, unpack
from nezha_vllm.semantic_id import code_token
from nezha_vllm.sharing import ranked_rows


@dataclass
class RecommendedItem(CompletionOutput):
    """One choice: ``text`` is the item's ID, ``cumulative_logprob`` its score, ``token_ids`` its L code tokens."""

    semantic_id: tuple[int, ...] = ()
    catalogue_version: str = ""


@dataclass(frozen=True)
class Summary:
    """What became of a request; ``reason`` says why there are fewer items than asked for, else None."""

    requested: int
    returned: int
    beam_width: int
    valid_beams: int
    drafted_beams: int
    catalogue_version: str
    reason: str | None
    unknown_excluded: int = 0


@dataclass(frozen=True)
class Answer:
    """The n best items, best first, column by column: what every kind of response is made from.

    ``shortage`` is why there are fewer, one of ``metrics.SHORTAGES``, else None.
    """

    item_ids: list[str]
    codes: list[list[int]]
    log_probs: list[list[float]]
    scores: list[float]
    summary: Summary
    shortage: str | None


def rank(plan: Plan, ids: RankedIds) -> Answer:
    """The n best items of the ranked semantic IDs."""
    catalogue = plan.service.catalogue
    rules, policy = plan.rules, catalogue.policy(plan.service.settings.shared_ids)
    index, log_probs_of = ids.index, ids.log_probs
    if rules.min_score is not None:
        high = log_probs_of.sum(1, dtype=np.float64) >= rules.min_score
        index, log_probs_of = index[high], log_probs_of[high]
    rows, beams = ranked_rows(
        catalogue, index, plan.n, policy=policy, max_per_id=rules.max_per_id, eligible=rules.eligible
    )
    log_probs = log_probs_of[beams].tolist()
    scores = [sum(of_levels) for of_levels in log_probs]
    codes = catalogue.codes[rows].tolist()
    shortage = None if len(rows) == plan.n else _shortage(plan, ids, len(index))
    reason = None if shortage is None else _reason(plan, ids, len(index), shortage)
    version, unknown = catalogue.version, rules.unknown
    summary = Summary(plan.n, len(rows), plan.beam_width, ids.num_valid, ids.num_drafted, version, reason, unknown)
    return Answer(catalogue.item_ids(rows.tolist()), codes, log_probs, scores, summary, shortage)


def items_of(answer: Answer, plan: Plan) -> list[RecommendedItem]:
    """The answer as vLLM's choices."""
    version = plan.service.catalogue.version
    items: list[RecommendedItem] = []
    columns = zip(answer.item_ids, answer.codes, answer.log_probs, answer.scores, strict=True)
    for item_id, codes, log_probs, score in columns:
        token_ids = plan.service.code_token_ids(codes)
        items.append(
            RecommendedItem(
                index=len(items),
                text=item_id,
                token_ids=token_ids,
                cumulative_logprob=score,
                logprobs=_logprobs(token_ids, codes, log_probs) if plan.with_logprobs else None,
                finish_reason="stop",
                semantic_id=tuple(codes),
                catalogue_version=version,
            )
        )
    return items


def _logprobs(token_ids: list[int], codes: list[int], log_probs: list[float]) -> list[dict[int, Logprob]]:
    levels = enumerate(zip(token_ids, codes, log_probs, strict=True))
    return [{token: Logprob(value, decoded_token=code_token(level, code))} for level, (token, code, value) in levels]


def _shortage(plan: Plan, ids: RankedIds, high_enough: int) -> str:
    """Why an answer has fewer items than asked for."""
    rules = plan.rules
    if high_enough < len(ids.index):
        return "min_score"
    if plan.validity == "final" and ids.num_valid < ids.num_drafted:
        return "beams"
    return "rules" if rules.eligible is not None or rules.max_per_id is not None else "catalogue"


def _reason(plan: Plan, ids: RankedIds, high_enough: int, shortage: str) -> str:
    kind = "catalogue items" if plan.rules.eligible is None else "eligible catalogue items"
    more = {
        "min_score": f"{high_enough} of the best {len(ids.index)} reach min_score, lower it",
        "beams": "send validity=stepwise or a larger beam_width",
        "rules": "the rules allow no more",
        "catalogue": "there are no more",
    }
    return f"{ids.num_valid} of {ids.num_drafted} finished beams are {kind}; {more[shortage]}"


class _PayloadSink:
    """Stands where vLLM keeps a request's logprobs processor and catches the payload instead."""

    logprobs = prompt_logprobs = prompt_token_id_logprobs = cumulative_logprob = None
    payload: Any = None

    def update_from_output(self, output: Any) -> None:
        if output.new_logprobs is not None:
            self.payload = output.new_logprobs

    def pop_prompt_logprobs(self) -> None:
        return None

    def pop_prompt_token_id_logprobs(self) -> None:
        return None


class NezhaRequestState(RequestState):
    """A request's state in the API process; vLLM makes it and :func:`adopt` changes its class."""

    plan: Plan
    answered: tuple[RankedIds, Answer] | None = None  # for the request's span

    def make_request_output(
        self, new_token_ids: Any, pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> Any:
        sink = self.logprobs_processor
        if finish_reason in (FinishReason.ABORT, FinishReason.ERROR) or sink.payload is None:
            return super().make_request_output(new_token_ids, pooling_output, finish_reason, *args, **kwargs)
        token_ids, log_probs, ranks, *_ = sink.payload
        ranked = unpack(token_ids[0], log_probs[0], ranks[0], self.plan.service.num_levels)
        if ranked.num_drafted == GONE:
            return unavailable(
                f"catalogue version {self.plan.service.catalogue.version} is gone from the engine: ask again"
            )
        answer = rank(self.plan, ranked)
        self.answered = ranked, answer
        if (counted := metrics.active()) is not None:
            counted.record(self.plan, ranked, answer)
        # vLLM reads outputs[0] while building, and there may be no item: hand it one and put the items in afterwards
        output = self._new_request_output(self.external_req_id, [_NO_ITEM], True)
        output.outputs = items_of(answer, self.plan) if self.plan.as_choices else []
        output.nezha, output.answer = answer.summary, answer
        return output


_NO_ITEM = CompletionOutput(index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None)


def adopt(state: RequestState, plan: Plan) -> RequestState:
    """Make a fresh request state ours."""
    state.__class__ = NezhaRequestState
    state.plan = plan
    state.logprobs_processor = _PayloadSink()
    return state
