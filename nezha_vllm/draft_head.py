"""The draft head (NEZHA, section on autoregressive drafting) and its reference beam search in plain PyTorch.

Shape suffixes, used throughout the project: N requests, K beam width, B beams alive, T codes of a level, L levels,
S = L + 1 hidden states a request (h_0 of the last history token, h_1 … h_L of the placeholders), H hidden size,
M semantic IDs in the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.semantic_id import SemanticIdCodec

if TYPE_CHECKING:
    from nezha_vllm.item_scores import ItemScores


class DraftHead(nn.Module):
    """z_l = W_l (s_l + h_l);  s_1 = h_0;  s_{l+1} = tanh(W_ih E_l[t_l] + b_ih + W_hh s_l + b_hh).

    The last level has no embedding and no cell: nothing follows it. With ``over_catalogue`` a stepwise search, and the
    training for it, normalise p_l over the codes that continue the prefix to an item (see `among`).
    """

    over_catalogue = False

    def __init__(self, hidden_size: int, codebook_sizes: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        self.logit_heads = nn.ModuleList(
            nn.Linear(hidden_size, size, bias=False, dtype=dtype) for size in codebook_sizes
        )
        inner = self.codebook_sizes[:-1]
        self.code_embeddings = nn.ModuleList(nn.Embedding(size, hidden_size, dtype=dtype) for size in inner)
        self.cells = nn.ModuleList(nn.RNNCell(hidden_size, hidden_size, dtype=dtype) for _ in inner)

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    def log_probs(self, level: int, state: Tensor, hidden: Tensor) -> Tensor:
        """log p_l over the level's codes in float32 [..., T] from the context state and h_l, both [..., H]."""
        return self.logit_heads[level](state + hidden).float().log_softmax(-1)

    def next_state(self, level: int, state: Tensor, codes: Tensor) -> Tensor:
        """s_{l+1} [..., H] from s_l [..., H] and the codes [...] chosen at level l."""
        return self.activation(self.code_drive(level, codes) + self.recurrence(level, state))

    def activation(self, drive: Tensor) -> Tensor:
        """The next state from the sum of ``code_drive`` and ``recurrence``, [..., H]."""
        return torch.tanh(drive)

    def code_drive(self, level: int, codes: Tensor) -> Tensor:
        """The code's part of the next state before tanh, W_ih E_l[t_l] + b_ih, [..., H] for codes [...]."""
        cell = self.cells[level]
        return F.linear(self.code_embeddings[level](codes), cell.weight_ih, cell.bias_ih)

    def recurrence(self, level: int, state: Tensor) -> Tensor:
        """The parent's part of the next state before tanh, W_hh s_l + b_hh, [..., H]."""
        cell = self.cells[level]
        return F.linear(state, cell.weight_hh, cell.bias_hh)

    @torch.no_grad()
    def code_drives(self) -> list[Tensor]:
        """``code_drive`` of every code, per inner level [T_l, H]. Serving makes these once, when weights are loaded."""
        device = self.logit_heads[0].weight.device
        inner = self.codebook_sizes[:-1]
        return [self.code_drive(level, torch.arange(size, device=device)) for level, size in enumerate(inner)]

    def forward(self, hidden_NSH: Tensor, codes_NL: Tensor) -> list[Tensor]:
        """Teacher-forced log-probabilities: per level a float32 tensor [N, T_l]."""
        state, outputs = hidden_NSH[:, 0], []
        for level in range(self.num_levels):
            outputs.append(self.log_probs(level, state, hidden_NSH[:, level + 1]))
            if level + 1 < self.num_levels:
                state = self.next_state(level, state, codes_NL[:, level])
        return outputs


def among(log_p: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities [..., T] → those over the ``allowed`` codes alone, minus infinity for the others.

    So the probabilities of all items sum to one, and nothing has to be learnt of which codes follow which: where one
    item is left, p is 1.
    """
    return log_p.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def among_items(log_probs: Sequence[Tensor], codes_VL: Tensor, keys_M: Tensor) -> list[Tensor]:
    """`among` of each level's log-probabilities, [V, T_l], for the codes that lead on from these items' prefixes."""
    codec = SemanticIdCodec([log_p_VT.shape[1] for log_p_VT in log_probs])
    prefix_V, found = torch.zeros_like(codes_VL[:, 0]), []
    for level, (size, suffix) in enumerate(zip(codec.codebook_sizes, codec.suffix_sizes, strict=True)):
        child_VT = prefix_V[:, None] * size + torch.arange(size, device=prefix_V.device)
        found.append(among(log_probs[level], has_key(keys_M, child_VT * suffix, suffix)))
        prefix_V = prefix_V * size + codes_VL[:, level]
    return found


@dataclass
class Beams:
    """Finished beams, best first: score descending, equal scores by semantic ID ascending (level 1 first).

    ``index_NK`` is the position in the catalogue's sorted keys, -1 beyond the request's valid beams;
    ``log_probs_NKL`` float32, one a level, the last with the item's score if there are `ItemScores`; ``scores_NK``
    their sum, -inf where there is no beam;
    ``drafted_N`` how many beams were finished before validity was checked, ``valid_N`` how many of them are items.
    """

    index_NK: Tensor
    log_probs_NKL: Tensor
    scores_NK: Tensor
    drafted_N: Tensor
    valid_N: Tensor


@dataclass(frozen=True)
class Eligible:
    """Semantic IDs that a request may get: those at ``positions`` among the keys if ``only``, else all but those.

    ``positions`` is an integer tensor, ascending, on the keys' device. With ``ranks``, those of a combination of
    segments (see `SegmentRanks`), "all" are the semantic IDs of that combination, and the listed are some of them.
    """

    positions: Tensor
    only: bool
    ranks: Tensor | None = None

    def any_in(self, low: Tensor, high: Tensor) -> Tensor:
        """Whether some of the keys [low, high) are eligible."""
        listed = torch.searchsorted(self.positions, high) - torch.searchsorted(self.positions, low)
        if self.only:
            return listed > 0
        return listed < (high - low if self.ranks is None else self.ranks[high] - self.ranks[low])


def select(scores_NC: Tensor, widths_N: Tensor) -> tuple[Tensor, Tensor]:
    """The ``widths_N[n]`` best finite candidates of each row, equal scores by lowest position.

    Returns positions [N, max width], ascending, and a mask of those that exist. Keeping positions ascending keeps
    beams in key order from level to level, which is what makes ties well defined.
    """
    num_rows, num_candidates = scores_NC.shape
    width = min(int(widths_N.max()), num_candidates)
    best_NK = scores_NC.topk(width, dim=1).values
    threshold_N1 = best_NK.gather(1, (widths_N.clamp(max=width) - 1)[:, None])
    above = scores_NC > threshold_N1
    tied = (scores_NC == threshold_N1) & (threshold_N1 > -torch.inf)
    room_N1 = widths_N[:, None] - above.sum(1, keepdim=True)
    taken = above | (tied & (tied.cumsum(1) <= room_N1))
    row, position = taken.nonzero(as_tuple=True)
    rank = taken.cumsum(1)[row, position] - 1
    positions_NK = torch.zeros(num_rows, width, dtype=torch.long, device=scores_NC.device)
    alive_NK = torch.zeros(num_rows, width, dtype=torch.bool, device=scores_NC.device)
    positions_NK[row, rank], alive_NK[row, rank] = position, True
    return positions_NK, alive_NK


@torch.no_grad()
def reference_beam_search(
    head: DraftHead,
    hidden_NSH: Tensor,
    keys_M: Tensor,
    widths_N: Tensor,
    stepwise_N: Tensor,
    code_drives: Sequence[Tensor] | None = None,
    eligible: Sequence[Eligible | None] | None = None,
    item_scores: ItemScores | None = None,
) -> Beams:
    """Beam search over semantic IDs, obvious rather than fast. Exact: a width of M or more is brute force.

    Args:
        hidden_NSH: hidden states after the backbone's final norm, S = L + 1.
        keys_M: the catalogue's keys, int64, strictly ascending, M ≥ 1.
        widths_N: beam width of each request, int64, ≥ 1.
        stepwise_N: bool; True masks every level by catalogue prefixes, False drops invalid beams at the end.
        eligible: which semantic IDs each request may get; None for all of them. Probabilities do not hang on it.
        code_drives: ``head.code_drives()`` kept from earlier, which halves the work; None computes what is needed.
        item_scores: what the beams at the end are put in order by, beside their log-probabilities.
    """
    assert len(keys_M) >= 1, "no keys to search"
    assert int(widths_N.min()) >= 1, "beam widths start at 1"
    codec = SemanticIdCodec(head.codebook_sizes)
    num_requests, device = len(hidden_NSH), hidden_NSH.device
    state_NBH = hidden_NSH[:, :1]
    prefix_NB = torch.zeros(num_requests, 1, dtype=torch.long, device=device)
    score_NB = torch.zeros(num_requests, 1, device=device)
    history_NBL = torch.zeros(num_requests, 1, 0, device=device)
    for level, (size, suffix) in enumerate(zip(codec.codebook_sizes, codec.suffix_sizes, strict=True)):
        log_p_NBT = head.log_probs(level, state_NBH, hidden_NSH[:, level + 1, None])
        child_NBT = prefix_NB[..., None] * size + torch.arange(size, device=device)
        allowed = ~stepwise_N[:, None, None] | has_key(keys_M, child_NBT * suffix, suffix)
        if head.over_catalogue:
            log_p_NBT = torch.where(stepwise_N[:, None, None], among(log_p_NBT, allowed), log_p_NBT)
        total_NBT = score_NB[..., None] + log_p_NBT
        for request, rule in enumerate(eligible or ()):
            if rule is not None and stepwise_N[request]:
                low = torch.searchsorted(keys_M, child_NBT[request] * suffix)
                high = torch.searchsorted(keys_M, (child_NBT[request] + 1) * suffix)
                allowed[request] &= rule.any_in(low, high)
        total_NBT = total_NBT.masked_fill(~allowed, -torch.inf)
        chosen_NK, alive_NK = select(total_NBT.flatten(1), widths_N)
        parent_NK, code_NK = chosen_NK // size, chosen_NK % size
        prefix_NB = child_NBT.flatten(1).gather(1, chosen_NK)
        score_NB = total_NBT.flatten(1).gather(1, chosen_NK).masked_fill(~alive_NK, -torch.inf)
        log_p_NK = log_p_NBT.flatten(1).gather(1, chosen_NK)
        history_NBL = torch.cat([gather_beams(history_NBL, parent_NK), log_p_NK[..., None]], dim=2)
        if level + 1 < codec.num_levels:
            drive_NKH = code_drives[level][code_NK] if code_drives else head.code_drive(level, code_NK)
            # W_hh before the gather: one row a parent, which at level 1 is one row a request instead of K
            state_NBH = head.activation(drive_NKH + gather_beams(head.recurrence(level, state_NBH), parent_NK))
    return finish(prefix_NB, score_NB, history_NBL, keys_M, eligible or (), item_scores, hidden_NSH[:, 0])


def finish(
    key_NK: Tensor,
    score_NK: Tensor,
    log_probs_NKL: Tensor,
    keys_M: Tensor,
    eligible: Sequence[Eligible | None],
    item_scores: ItemScores | None,
    first_NH: Tensor,
) -> Beams:
    """Drop the beams that are no items and sort the others, which arrive in the order of their keys.

    ``first_NH``: h_0, of which ``item_scores`` makes what is added to the last level's log-probabilities.
    """
    drafted_NK = score_NK > -torch.inf
    index_NK = torch.searchsorted(keys_M, key_NK).clamp(max=len(keys_M) - 1)
    valid_NK = drafted_NK & (keys_M[index_NK] == key_NK)
    for request, rule in enumerate(eligible):
        if rule is not None:
            valid_NK[request] &= rule.any_in(index_NK[request], index_NK[request] + 1)
    if item_scores is not None:
        request_X, beam_X = valid_NK.nonzero(as_tuple=True)
        log_probs_NKL[request_X, beam_X, -1] += item_scores(first_NH[request_X], key_NK[request_X, beam_X])
        score_NK, lowest = log_probs_NKL.sum(2), torch.finfo(torch.float32).min
        score_NK = score_NK.where(score_NK > lowest, lowest)  # what is no number is behind all other items
    score_NK = score_NK.masked_fill(~valid_NK, -torch.inf)
    # beams arrive in key order, so a stable sort leaves equal scores in key order
    score_NK, order_NK = score_NK.sort(dim=1, descending=True, stable=True)
    index_NK = index_NK.masked_fill(~valid_NK, -1).gather(1, order_NK)
    return Beams(index_NK, gather_beams(log_probs_NKL, order_NK), score_NK, drafted_NK.sum(1), valid_NK.sum(1))


def has_key(keys_M: Tensor, low: Tensor, span: int) -> Tensor:
    """Whether a key lies in [low, low + span)."""
    at = torch.searchsorted(keys_M, low)
    return (at < len(keys_M)) & (keys_M[at.clamp(max=len(keys_M) - 1)] - low < span)


def gather_beams(values_NBX: Tensor, index_NK: Tensor) -> Tensor:
    """values [N, K, X] of the chosen beams."""
    return values_NBX.gather(1, index_NK[..., None].expand(-1, -1, values_NBX.shape[2]))
