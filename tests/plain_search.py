"""Beam search by lists and sorts: slow, one request at a time, and simple enough to be believed.

Only the head's equations are shared with the package; they have a test of their own in test_draft_head.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nezha_vllm.draft_head import DraftHead
from nezha_vllm.semantic_id import SemanticIdCodec


@dataclass
class Answer:
    """Items best first: their positions among the catalogue's keys, scores, log-probabilities a level."""

    index: list[int]
    scores: list[float]
    log_probs: list[list[float]]
    drafted: int


def plain_search(
    head: DraftHead,
    hidden_SH: Tensor,
    keys: np.ndarray,
    width: int,
    stepwise: bool,
    eligible: Sequence[int] | None = None,
) -> Answer:
    """Keep the ``width`` best prefixes a level; equal scores by prefix, smallest codes first.

    ``eligible``: positions among the keys of those that may come back. With a softmax over the catalogue a stepwise
    search takes codes that lead to no item at all out of the logits, whatever is eligible.
    """
    items = [tuple(codes) for codes in SemanticIdCodec(head.codebook_sizes).codes_of_key(keys).tolist()]
    kept = items if eligible is None else [items[index] for index in eligible]
    beams = [((), np.float32(0), [], hidden_SH[0])]
    for level in range(head.num_levels):
        known, prefixes = ({item[: level + 1] for item in group} for group in (items, kept))
        children = []
        for prefix, score, log_probs, state in beams:
            log_p_T = head.log_probs(level, state, hidden_SH[level + 1])
            if stepwise and head.over_catalogue:
                strays = [code for code in range(len(log_p_T)) if (*prefix, code) not in known]
                log_p_T[strays] = -torch.inf
                log_p_T = log_p_T.log_softmax(-1)
            for code, log_prob in enumerate(log_p_T.numpy()):
                child = (*prefix, code)
                if not stepwise or child in prefixes:
                    children.append((child, score + log_prob, [*log_probs, float(log_prob)], state))
        children.sort(key=lambda beam: (-beam[1], beam[0]))
        beams = children[:width]
        if level + 1 < head.num_levels:
            beams = [
                (prefix, score, log_probs, head.next_state(level, state, torch.tensor(prefix[-1])))
                for prefix, score, log_probs, state in beams
            ]
    position = {item: index for index, item in enumerate(items)}
    found = [beam for beam in beams if beam[0] in set(kept)]
    return Answer(
        [position[prefix] for prefix, *_ in found],
        [float(score) for _, score, *_ in found],
        [log_probs for _, _, log_probs, _ in found],
        len(beams),
    )
