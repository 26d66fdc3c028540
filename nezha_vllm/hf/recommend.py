"""Recommendations straight from a transformers model: the reference of what the server answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nezha_vllm.beam import BeamSearch
from nezha_vllm.config import AUTOREGRESSIVE, VALIDITY_MODES
from nezha_vllm.draft_head import Beams
from nezha_vllm.hf.language_model import language_model_beam_search
from nezha_vllm.hf.prompt import history_prompts
from nezha_vllm.sharing import ranked_rows

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.config import NezhaConfig
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM, NezhaQwen3ForCausalLM


@dataclass(frozen=True)
class Recommendation:
    """One item; ``score`` is the sum of ``log_probs``, one a level, the last with what the item itself is worth."""

    item_id: str
    score: float
    codes: tuple[int, ...]
    log_probs: tuple[float, ...]


def check_catalogue(config: NezhaConfig, catalogue: Catalogue) -> None:
    """Raise ``ValueError`` if the checkpoint and the catalogue do not have the same levels."""
    ours, theirs = tuple(config.codebook_sizes), catalogue.codec.codebook_sizes
    if ours != theirs:
        raise ValueError(
            f"the checkpoint has codebook sizes {ours} but catalogue {catalogue.version} has {theirs}; "
            "use the catalogue that the checkpoint was trained with, or train again"
        )


@torch.no_grad()
def recommend(
    model: NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM,
    histories: Sequence[Sequence[str]],
    n: int,
    *,
    catalogue: Catalogue,
    beam_width: int | None = None,
    validity: str | None = None,
    prefix: Sequence[int] = (),
    kernels: bool = True,
) -> list[list[Recommendation]]:
    """The n best items for each history, best first; fewer if the beams hold fewer valid items.

    Args:
        histories: item IDs, oldest first, at least one each.
        n: number of items wanted, at most ``beam_width``.
        beam_width, validity: default from the checkpoint's configuration.
        prefix: token ids in front of the history, see ``prompt.prefix_token_ids``.
        kernels: on a GPU, search by the Triton kernels; without them PyTorch's operations alone answer.

    Raises:
        ValueError: levels that differ, an empty history, n or validity out of range.
        UnknownItemError: an item that the catalogue does not hold.
    """
    width = model.config.beam_width if beam_width is None else beam_width
    if not 1 <= n <= width:
        raise ValueError(f"n is {n}, must be between 1 and the beam width, {width}")
    beams = search(
        model, histories, catalogue=catalogue, beam_width=width, validity=validity, prefix=prefix, kernels=kernels
    )
    policy = catalogue.policy(model.config.shared_ids)
    return [_items(beams, row, n, catalogue, policy) for row in range(len(histories))]


@torch.no_grad()
def search(
    model: NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM,
    histories: Sequence[Sequence[str]],
    *,
    catalogue: Catalogue,
    beam_width: int | None = None,
    validity: str | None = None,
    prefix: Sequence[int] = (),
    kernels: bool = True,
) -> Beams:
    """The beams behind ``recommend``, one row a history."""
    prompts = history_prompts(model.config, catalogue, histories, prefix, model.item_tokens)
    return searcher(model, catalogue, beam_width, validity, kernels)(*pad_left(prompts, model.device))


def searcher(
    model: NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM,
    catalogue: Catalogue,
    beam_width: int | None = None,
    validity: str | None = None,
    kernels: bool = True,
) -> Callable[[Tensor, Tensor], Beams]:
    """Prompts [N, Q] and their mask, padded on the left → beams. What all batches share is made once."""
    config = model.config
    check_catalogue(config, catalogue)
    width = config.beam_width if beam_width is None else beam_width
    validity = config.validity if validity is None else validity
    if validity not in VALIDITY_MODES:
        raise ValueError(f"validity is {validity!r}, must be one of {VALIDITY_MODES}")
    keys_M, stepwise = torch.from_numpy(catalogue.keys.copy()).to(model.device), validity == "stepwise"
    item_scores = model.item_scores
    if config.method == AUTOREGRESSIVE:
        return lambda ids, mask: language_model_beam_search(model, ids, mask, keys_M, width, stepwise, item_scores)
    with torch.no_grad():
        beam_search = BeamSearch(model.draft_head, keys_M, item_scores)

    def search_batch(input_ids: Tensor, attention_mask: Tensor) -> Beams:
        hidden_NSH = model.hidden_states_for(input_ids, attention_mask)
        return beam_search(hidden_NSH, [width] * len(input_ids), [stepwise] * len(input_ids), kernels=kernels)

    return search_batch


def item_ids(beams: Beams, n: int, catalogue: Catalogue, policy: str) -> list[list[str]]:
    """The n best items of each row of beams."""
    index_NK = beams.index_NK.cpu().numpy()
    found = (ranked_rows(catalogue, index[index >= 0], n, policy=policy)[0] for index in index_NK)
    return [catalogue.item_ids(rows.tolist()) for rows in found]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [N, Q] of prompts of different lengths."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _items(beams: Beams, row: int, n: int, catalogue: Catalogue, policy: str) -> list[Recommendation]:
    index = beams.index_NK[row].cpu().numpy()
    rows, ranks = ranked_rows(catalogue, index[index >= 0], n, policy=policy)
    scores, log_probs = beams.scores_NK[row].tolist(), beams.log_probs_NKL[row].tolist()
    columns = zip(catalogue.item_ids(rows.tolist()), catalogue.codes[rows].tolist(), ranks.tolist(), strict=True)
    return [Recommendation(item, scores[rank], tuple(codes), tuple(log_probs[rank])) for item, codes, rank in columns]
