"""The two kinds of teacher: how each reads packed rows, and what it gives to items (see ``teachers``).

Shapes as in ``hf.modeling``; I items that have a token, J items of the catalogue on the semantic IDs of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from nezha_vllm.hf.modeling import register_models
from nezha_vllm.item_tokens import ItemTokens, load_item_tokens
from nezha_vllm.training.graphs import fuse_norms
from nezha_vllm.training.options import SASREC
from nezha_vllm.training.packing import PackedCollator, Places
from nezha_vllm.training.sasrec import PADDING, SasRecModel
from nezha_vllm.training.start import load_trained, training_note

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue

Reader = Callable[[Sequence[Tensor], Places], dict[str, Tensor]]  # numbered pieces, and where they go


class NezhaTeacher:
    """A checkpoint of `nezha train`: the softmax over items of the products of h_0 and their vectors.

    Raises ``ValueError`` unless it has the student's catalogue and item tokens, and learnt such products.
    """

    def __init__(self, folder: str, tokens: ItemTokens, catalogue: Catalogue, device: torch.device) -> None:
        _check(Path(folder), tokens)
        trained = load_trained(Path(folder))
        if trained.catalogue.version != catalogue.version:
            raise ValueError(
                f"--teacher {folder} was trained with catalogue {trained.catalogue.version}, this run has "
                f"{catalogue.version}: train it with this one"
            )
        self.model, self.prefix = trained.model.to(device).eval().requires_grad_(False), tuple(trained.prefix)
        if device.type == "cuda":
            fuse_norms(self.model)
        self.tokens, self.items_IH = ItemTokens.of(tokens.keys, self.model.config), self.model.item_vectors()
        # two that have this in common read the same rows
        self.reads = self.prefix, self.tokens.first, tuple(self.tokens.offsets.tolist())

    def reader(self, student: PackedCollator, short_rows: bool) -> Reader:
        """Numbered pieces → rows as the student's, without dropout and without what stands behind the history."""
        pack = PackedCollator(
            self.model.config,
            student.max_history,
            self.prefix,
            device=student.device,
            row_multiple=student.row_multiple,
            item_tokens=self.tokens,
            short_rows=short_rows,
        )

        def read(pieces: Sequence[Tensor], where: Places) -> dict[str, Tensor]:
            batch = pack([codes[:, :-1] for codes in pieces], where)
            end = pack.history_end
            return {
                "ids": batch["input_ids"][:, :end],
                "mask": batch["attention_mask"][:, :, :end, :end],
                "positions": batch["position_ids"][:, :end],
                "last": batch["read_positions"][..., :1],
            }

        return read

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """h_0 [N, P, H]."""
        return self.model(ids, mask, positions, last).hidden_states[:, :, 0]

    def probabilities(self, hidden_VH: Tensor) -> Tensor:
        """Over the items with a token, float32 [V, I]."""
        return F.linear(hidden_VH, self.items_IH).float().softmax(1)


class SasRecTeacher:
    """SASRec over all items of the catalogue; a semantic ID has the probabilities of all of its items."""

    reads = (SASREC,)

    def __init__(self, model: SasRecModel, heads: int, tokens: ItemTokens, catalogue: Catalogue) -> None:
        self.model, self.heads, self.count = model.eval().requires_grad_(False), heads, len(tokens)
        device = model.item.weight.device
        keys = np.repeat(catalogue.keys, np.diff(catalogue.first_row))
        at = np.searchsorted(tokens.keys, keys).clip(max=len(tokens) - 1)
        row_J = np.flatnonzero(tokens.keys[at] == keys)
        self.items_JH = model.item.weight[torch.from_numpy(row_J).to(device) + 1]
        at_J = at[row_J]
        alone = np.array_equal(at_J, np.arange(len(tokens)))
        self.at_J = None if alone else torch.from_numpy(at_J).to(device)

    def reader(self, student: PackedCollator, short_rows: bool) -> Reader:
        """Numbered pieces → SASRec's item numbers [N, P], where it may not look [N, P, P], and positions [N, P]."""
        targets, device = student.max_history, student.device
        index_P = torch.arange(targets, device=device)

        def read(pieces: Sequence[Tensor], where: Places) -> dict[str, Tensor]:
            row_V, first_V, place_V, count = where
            items_NP = torch.full((count, targets), PADDING)
            items_NP[row_V, place_V] = torch.cat([codes[:-1, -1] for codes in pieces]) + 1
            first_NP = torch.full((count, targets), targets)  # unused places, at the end, are a piece of their own
            first_NP[row_V, place_V] = first_V
            items_NP, first_NP = student.moved(items_NP), student.moved(first_NP)
            blind_NPP = (first_NP[:, :, None] != first_NP[:, None]) | (index_P > index_P[:, None])
            return {"items": items_NP, "blind": blind_NPP, "positions": index_P - first_NP.where(items_NP > 0, 0)}

        return read

    def hidden(self, items: Tensor, blind: Tensor, positions: Tensor) -> Tensor:
        """Of what follows each place [N, P, H]."""
        hidden_NPH = self.model.item(items) + self.model.position(positions)
        mask = blind[:, None].expand(-1, self.heads, -1, -1).flatten(0, 1)  # repeat_interleave may ask the host
        with _no_fast_path():
            return self.model.encoder(hidden_NPH, mask, is_causal=False)

    def probabilities(self, hidden_VH: Tensor) -> Tensor:
        """Over the items with a token, float32 [V, I]."""
        p_VJ = F.linear(hidden_VH, self.items_JH).float().softmax(1)
        if self.at_J is None:
            return p_VJ
        return p_VJ.new_zeros(len(p_VJ), self.count).index_add_(1, self.at_J, p_VJ)


def _check(folder: Path, tokens: ItemTokens) -> None:
    """Raises ``ValueError`` for what its files say, before its weights are read."""
    who = f"--teacher {folder}"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{who}: neither `{SASREC}`, `{SASREC}:SEED` nor a folder with a config.json")
    note = training_note(folder)
    if not note:
        raise ValueError(f"{who} has no training.json: a teacher is a checkpoint made by `nezha train`")
    register_models()
    config: Any = AutoConfig.from_pretrained(folder)
    sizes = tokens.codec.codebook_sizes
    if tuple(config.codebook_sizes) != sizes:
        raise ValueError(
            f"{who} has codebooks of {tuple(config.codebook_sizes)}, this catalogue of {sizes}: train it with this one"
        )
    if not config.num_item_tokens:
        raise ValueError(f"{who} has no item tokens: train it with those of this run, `--item-tokens {len(tokens)}`")
    if not note.get("item_loss") or "item_score_weight" not in note:
        raise ValueError(f"{who} has not learnt what items are worth: train it with `--item-loss` above 0")
    if config.short_histories != tokens.short:
        has, run = ("short", "without") if config.short_histories else ("no short", "with")
        raise ValueError(f"{who} reads {has} histories: train it {run} `--short-histories`, as this run")
    keys = load_item_tokens(folder, config).keys
    if not np.array_equal(keys, tokens.keys):
        raise ValueError(
            f"{who} has {len(keys):,} item tokens, not the same as the {len(tokens):,} of this run: train it with the "
            "same `--item-tokens` on the same data set"
        )


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch's fused encoder layers in evaluation, which a CUDA graph cannot hold, are off within."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
