"""Leave-one-out evaluation by full ranking: the model's beams compete over the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nezha_vllm.config import AUTOREGRESSIVE
from nezha_vllm.hf.prompt import code_token_ids, history_prompts
from nezha_vllm.hf.recommend import item_ids, pad_left, search
from nezha_vllm.training.metrics import CUTOFFS, ranks_of

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue
    from nezha_vllm.hf.modeling import NezhaLlamaForCausalLM, NezhaQwen3ForCausalLM

    NezhaModel = NezhaLlamaForCausalLM | NezhaQwen3ForCausalLM


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
    """The best items of each history; how many beams were finished in all, and how many of them were items."""

    items: list[list[str]]
    drafted: int
    valid: int

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
    drafted = valid = 0
    for start in track(range(0, len(histories), batch_size)):
        batch = [items[-max_history:] for items in histories[start : start + batch_size]]
        beams = search(model, batch, catalogue=catalogue, beam_width=beam_width, validity=validity, prefix=prefix)
        found += item_ids(beams, n, catalogue, model.config.shared_ids)
        drafted += int(beams.drafted_N.sum())
        valid += int(beams.valid_N.sum())
    return Ranked(found, drafted, valid)


def model_ranks(
    model: NezhaModel,
    catalogue: Catalogue,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    **options: Any,
) -> np.ndarray:
    """Ranks of the targets, from 0; ``metrics.UNRANKED`` beyond the largest cut-off."""
    return ranks_of(targets, ranked(model, catalogue, histories, **options).items)


@torch.no_grad()
def target_loss(
    model: NezhaModel,
    catalogue: Catalogue,
    histories: Sequence[Sequence[str]],
    targets: Sequence[str],
    *,
    max_history: int,
    prefix: Sequence[int] = (),
    batch_size: int = 256,
) -> float:
    """Mean over targets and levels of the cross-entropy, as in training but without smoothing and dropout."""
    config = model.config
    model.eval()
    total = 0.0
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        prompts = history_prompts(config, catalogue, [items[-max_history:] for items in histories[part]], prefix)
        labels_NL = torch.from_numpy(catalogue.codes[catalogue.rows(targets[part])]).long().to(model.device)
        if config.method == AUTOREGRESSIVE:
            forced_NL = code_token_ids(config, labels_NL.cpu())
            prompts = [[*prompt, *codes[:-1]] for prompt, codes in zip(prompts, forced_NL.tolist(), strict=True)]
        hidden_NSH = model.hidden_states_for(*pad_left(prompts, model.device))
        log_probs = model.code_log_probs(hidden_NSH, labels_NL)
        truth = [log_p_NT.gather(1, labels_NL[:, level, None]) for level, log_p_NT in enumerate(log_probs)]
        total -= float(torch.stack(truth).mean(0).sum())
    return total / len(targets)
