"""Beam search by lists and sorts: slow, one request at a time, and simple enough to be believed.

Only the head's equations are shared with the package; they have a test of their own in test_draft_head.py.
"""

from __future__ import annotations

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


def plain_search(head: DraftHead, hidden_SH: Tensor, keys: np.ndarray, width: int, stepwise: bool) -> Answer:
    """Keep the ``width`` best prefixes a level; equal scores by prefix, smallest codes first."""
    items = [tuple(codes) for codes in SemanticIdCodec(head.codebook_sizes).codes_of_key(keys).tolist()]
    beams = [((), np.float32(0), [], hidden_SH[0])]
    for level in range(head.num_levels):
        prefixes = {item[: level + 1] for item in items}
        children = []
        for prefix, score, log_probs, state in beams:
            for code, log_prob in enumerate(head.log_probs(level, state, hidden_SH[level + 1]).numpy()):
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
    found = [beam for beam in beams if beam[0] in position]
    return Answer(
        [position[prefix] for prefix, *_ in found],
        [float(score) for _, score, *_ in found],
        [log_probs for _, _, log_probs, _ in found],
        len(beams),
    )
