"""How finished beams travel from an engine process to the API process.

vLLM passes one array pair a request through its logprobs channel without looking inside (`LogprobsTensors` in
``vllm/v1/outputs.py``). Row n of a batch carries the n best beams of request n:

* ``token_ids`` int32 [N, 1 + C]: how many beams were finished before validity was checked, ``GONE`` if there is no
  catalogue to search; then positions in the catalogue's sorted keys, -1 where there is none;
* ``log_probs`` float32 [N, C · L]: the beams' log-probabilities, one a level;
* ``ranks`` int64 [N]: how many of the finished beams are items, in the lower half; in the upper half how many
  microseconds the draft stage took, 0 if unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nezha_vllm.draft_head import Beams


class Payload(NamedTuple):
    token_ids: Tensor
    log_probs: Tensor
    ranks: Tensor


def pack(beams: Beams, width: int) -> Payload:
    """The ``width`` best beams of every request, in the layout above."""
    index_NC = beams.index_NK[:, :width]
    token_ids = torch.cat([beams.drafted_N[:, None], index_NC], dim=1).int()
    return Payload(token_ids, beams.log_probs_NKL[:, :width].flatten(1).float(), beams.valid_N.long())


class HostPayload(NamedTuple):
    """The same on the host, where a step's launches end up."""

    token_ids: np.ndarray
    log_probs: np.ndarray
    ranks: np.ndarray


AnyPayload = TypeVar("AnyPayload", Payload, HostPayload)

GONE = -1
_SECONDS_AT = 32  # bits below


def with_seconds(payload: AnyPayload, seconds: float) -> AnyPayload:
    """The payload of a step whose draft stage took so long."""
    return payload._replace(ranks=payload.ranks + (round(seconds * 1e6) << _SECONDS_AT))


def with_gone(payload: AnyPayload, rows: Sequence[int]) -> AnyPayload:
    """The payload, where the catalogue that some of the requests are to be answered from is gone."""
    if rows:
        payload.token_ids[list(rows), 0] = GONE
    return payload


def gather(
    parts: Sequence[tuple[Sequence[int], np.ndarray]], num_requests: int, width: int, levels: int
) -> HostPayload:
    """Payload of a step from the kernels' answers, int32 [rows, 2 + K · (1 + L)] each, and the rows they stand for.

    Everything is copied: the answers lie in memory that later steps use again.
    """
    token_ids = np.full((num_requests, 1 + width), -1, np.int32)
    token_ids[:, 0] = 0
    log_probs = np.zeros((num_requests, width, levels), np.float32)
    ranks = np.zeros(num_requests, np.int64)
    for rows, answer in parts:
        beams = answer[:, 2:].reshape(len(answer), -1, 1 + levels)[:, :width]
        kept = beams.shape[1]
        ranks[rows], token_ids[rows, 0] = answer[:, 0], answer[:, 1]
        token_ids[rows, 1 : 1 + kept] = beams[..., 0]
        log_probs[rows, :kept] = beams[..., 1:].view(np.float32)
    return HostPayload(token_ids, log_probs.reshape(num_requests, -1), ranks)


def on_device(parts: Sequence[tuple[Sequence[int], Tensor]], num_requests: int, width: int, levels: int) -> Payload:
    """`gather` where the answers are: for runners that bring the payload to the host themselves."""
    device = parts[0][1].device
    token_ids = torch.full((num_requests, 1 + width), -1, dtype=torch.int32, device=device)
    token_ids[:, 0] = 0
    log_probs = torch.zeros(num_requests, width, levels, device=device)
    ranks = torch.zeros(num_requests, dtype=torch.long, device=device)
    for rows, answer in parts:
        target = torch.tensor(rows, device=device)
        beams = answer[:, 2:].view(len(answer), -1, 1 + levels)[:, :width]
        kept = beams.shape[1]
        ranks[target] = answer[:, 0].long()
        token_ids[target, : 1 + kept] = torch.cat([answer[:, 1:2], beams[..., 0]], dim=1)
        log_probs[target, :kept] = beams[..., 1:].contiguous().view(torch.float32)
    return Payload(token_ids, log_probs.flatten(1), ranks)


def empty(num_requests: int, device: torch.device) -> Payload:
    """Rows for steps that finish no request, such as warm-up or a chunk of a long prompt."""
    return Payload(
        torch.zeros(num_requests, 1, dtype=torch.int32, device=device),
        torch.zeros(num_requests, 0, device=device),
        torch.zeros(num_requests, dtype=torch.long, device=device),
    )


@dataclass(frozen=True)
class RankedIds:
    """One request's beams, best first: positions in the catalogue's keys [C'] and log-probabilities [C', L].

    ``draft_seconds`` is what the draft stage took for all requests of its step, 0 if unknown.
    """

    index: np.ndarray
    log_probs: np.ndarray
    num_drafted: int
    num_valid: int
    draft_seconds: float = 0.0


def unpack(token_ids: np.ndarray, log_probs: np.ndarray, rank: int, num_levels: int) -> RankedIds:
    """One row of a payload; beams that do not exist are left out."""
    index = token_ids[1:]
    exists = index >= 0
    microseconds, num_valid = divmod(int(rank), 1 << _SECONDS_AT)
    log_probs_of = log_probs.reshape(-1, num_levels)[exists]
    return RankedIds(index[exists], log_probs_of, int(token_ids[0]), num_valid, microseconds / 1e6)
