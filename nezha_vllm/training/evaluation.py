"""Leave-one-out evaluation by full ranking: the model's beams compete over the whole catalogue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nezha_vllm.config import AUTOREGRESSIVE
from nezha_vllm.hf.prompt import history_prompts
from nezha_vllm.hf.recommend import item_ids, pad_left, searcher
from nezha_vllm.training.metrics import CUTOFFS, UNRANKED, ndcg, ranks_of

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.config import NezhaConfig
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM, NezhaQwen3ForCausalLM
    from nezha_vllm.item_tokens import ItemTokens

    NezhaModel = NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM


MAX_TOKENS = 1 << 16  # of a forward pass, in float32 where training may have been in bfloat16


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how it is asked. ``prefix``: token ids before the history; ``options``: it was trained with."""

    name: str
    model: NezhaModel
    catalogue: Catalogue
    max_history: int
    prefix: Sequence[int] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """The best items of each history; how many beams were finished in all, and how many of them were items.

    ``milliseconds``: of each batch, from item IDs to item IDs.
    """

    items: list[list[str]]
    drafted: int
    valid: int
    milliseconds: list[float]

    @property
    def valid_share(self) -> float:
        return self.valid / self.drafted


Track = Callable[[Sequence[int]], Iterable[int]]


def ranked(
    model: NezhaModel,
    catalogue: Catalogue,
    histories: Sequence[Sequence[str]],
    *,
    n: int = max(CUTOFFS),
    max_history: int,
    beam_width: int | None = None,
    validity: str | None = None,
    prefix: Sequence[int] = (),
    batch_size: int | None = None,
    track: Track = iter,
) -> Ranked:
    """The n best items for the last ``max_history`` items of each history."""
    model.eval()
    batch_size = batch_size or (512 if model.device.type == "cuda" else 64)
    found: list[list[str]] = []
    milliseconds: list[float] = []
    drafted = valid = 0
    find, item_tokens = searcher(model, catalogue, beam_width, validity), model.item_tokens
    for start in track(range(0, len(histories), batch_size)):
        began = time.perf_counter()
        batch = [items[-max_history:] for items in histories[start : start + batch_size]]
        prompts = history_prompts(model.config, catalogue, batch, prefix, item_tokens)
        beams = find(*pad_left(prompts, model.device))
        found += item_ids(beams, n, catalogue, catalogue.policy(model.config.shared_ids))
        milliseconds.append(1000 * (time.perf_counter() - began))  # items have come from the GPU, so it has finished
        drafted += int(beams.drafted_N.sum())
        valid += int(beams.valid_N.sum())
    return Ranked(found, drafted, valid, milliseconds)


def device_name(device: torch.device) -> str:
    """A GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class HeldOut:
    """Histories and the items that follow them, on the device once and for all: for validation at every epoch.

    ``max_history``: items of a history that are read; ``prefix``: token ids before them; ``item_tokens``: the model's.
    """

    def __init__(
        self,
        config: NezhaConfig,
        catalogue: Catalogue,
        histories: Sequence[Sequence[str]],
        targets: Sequence[str],
        *,
        max_history: int,
        prefix: Sequence[int] = (),
        item_tokens: ItemTokens | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.catalogue, self.histories, self.targets = catalogue, histories, targets
        self.ask: dict[str, Any] = {"max_history": max_history, "prefix": prefix}
        recent = [items[-max_history:] for items in histories]
        prompts = history_prompts(config, catalogue, recent, prefix, item_tokens)
        batch_size = batch_size or max(1, MAX_TOKENS // max(map(len, prompts), default=1))
        # histories of similar length share a batch: little padding
        self.order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        rows = np.asarray(catalogue.rows(targets))
        self.labels_NL = torch.from_numpy(catalogue.codes[rows]).long()
        self.keys_M = torch.from_numpy(catalogue.keys.copy())
        self.semantic_ids = np.searchsorted(catalogue.first_row, rows, side="right") - 1
        self.turns = rows - catalogue.first_row[self.semantic_ids]
        self.shared_by = np.diff(catalogue.first_row)  # items of each semantic ID
        parts = [self.order[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        self.batches = [(part, *pad_left([prompts[row] for row in part])) for part in parts]

    @torch.no_grad()
    def loss(self, model: NezhaModel) -> float:
        """Mean over targets and levels of the cross-entropy, as in training but without smoothing and dropout."""
        config = model.config
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        self.keys_M = self.keys_M.to(model.device)
        for part, ids_NQ, mask_NQ in self._batches(model.device):
            labels_NL = self.labels_NL[part].to(model.device)
            if config.method == AUTOREGRESSIVE:
                forced_NL = labels_NL + torch.tensor(config.code_token_offsets, device=model.device)
                ids_NQ = torch.cat([ids_NQ, forced_NL[:, :-1]], dim=1)
                mask_NQ = torch.cat([mask_NQ, mask_NQ.new_ones(len(part), labels_NL.shape[1] - 1)], dim=1)
            log_probs = model.code_log_probs(model.hidden_states_for(ids_NQ, mask_NQ), labels_NL, self.keys_M)
            truth = [log_p_NT.gather(1, labels_NL[:, level, None]) for level, log_p_NT in enumerate(log_probs)]
            total -= torch.stack(truth).mean(0).double().sum()
        return float(total) / len(self.targets)

    @torch.no_grad()
    def ranks(self, model: NezhaModel, beam_width: int) -> np.ndarray:
        """Ranks of the targets, from 0; ``metrics.UNRANKED`` beyond the beam or the largest cut-off."""
        shared = len(self.catalogue.keys) < self.catalogue.num_items
        policy = self.catalogue.policy(model.config.shared_ids)
        if shared and policy != "expand":  # a rank hangs on all that the beams hold
            found = ranked(model, self.catalogue, self.histories, beam_width=beam_width, **self.ask)
            return ranks_of(self.targets, found.items)
        model.eval()
        ranks = np.full(len(self.targets), UNRANKED)
        find = searcher(model, self.catalogue, beam_width, kernels=False)  # they take longer to compile than to run
        for part, ids_NQ, mask_NQ in self._batches(model.device):
            ranks[part] = self._ranks(part, find(ids_NQ, mask_NQ).index_NK)
        return ranks

    @torch.no_grad()
    def ndcg_by_weight(self, model: NezhaModel, beam_width: int, weights: Sequence[float]) -> dict[float, float]:
        """NDCG@10 with each of these weights of item scores, from one search; the model's configuration has none."""
        model.eval()
        ranks = {weight: np.full(len(self.targets), UNRANKED) for weight in weights}
        find, item_scores = searcher(model, self.catalogue, beam_width, kernels=False), model.item_scores_of(1.0)
        self.keys_M = self.keys_M.to(model.device)
        for part, ids_NQ, mask_NQ in self._batches(model.device):
            beams, first_NH = find(ids_NQ, mask_NQ), model.first_hidden(ids_NQ, mask_NQ)
            request_X, beam_X = (beams.index_NK >= 0).nonzero(as_tuple=True)
            added_NK = torch.zeros_like(beams.scores_NK)
            keys_X = self.keys_M[beams.index_NK[request_X, beam_X]]
            added_NK[request_X, beam_X] = item_scores(first_NH[request_X], keys_X)
            for weight in weights:
                order_NK = (beams.scores_NK + weight * added_NK).argsort(dim=1, descending=True, stable=True)
                ranks[weight][part] = self._ranks(part, beams.index_NK.gather(1, order_NK))
        return {weight: ndcg(found, 10) for weight, found in ranks.items()}

    def _ranks(self, part: np.ndarray, index_NK: Tensor) -> np.ndarray:
        """Of the targets of these rows in their beams, where all items of an ID come out."""
        best_NK = index_NK[:, : max(CUTOFFS)].cpu().numpy()
        hit_NK = best_NK == self.semantic_ids[part][:, None]
        # all items of the IDs before come first, then those of its own ID that precede it
        before_NK = np.cumsum(self.shared_by[best_NK], axis=1) - self.shared_by[best_NK]
        place_N = (before_NK * hit_NK).sum(1) + self.turns[part]
        return np.where(hit_NK.any(1) & (place_N < max(CUTOFFS)), place_N, UNRANKED)

    def _batches(self, device: torch.device) -> list[tuple[np.ndarray, Tensor, Tensor]]:
        if self.batches and self.batches[0][1].device != device:
            self.batches = [(part, ids.to(device), mask.to(device)) for part, ids, mask in self.batches]
        return self.batches


def model_ranks(
    model: NezhaModel,
    catalogue: Catalogue,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    **options: Any,
) -> np.ndarray:
    """Ranks of the targets, from 0; ``metrics.UNRANKED`` beyond the largest cut-off."""
    return ranks_of(targets, ranked(model, catalogue, histories, **options).items)


def target_loss(
    model: NezhaModel, catalogue: Catalogue, histories: Sequence[Sequence[str]], targets: Sequence[str], **options: Any
) -> float:
    """``HeldOut.loss`` of histories that are asked once."""
    return HeldOut(model.config, catalogue, histories, targets, item_tokens=model.item_tokens, **options).loss(model)
