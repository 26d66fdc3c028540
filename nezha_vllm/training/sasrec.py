"""SASRec with cross-entropy over all items: the trained baseline that generative recommenders are often spared.

Kang and McAuley 2018 (arXiv 1808.09781), a causal Transformer over item embeddings, with the softmax over the whole
catalogue in place of one sampled negative. Shapes: U rows, W items of a row, M items, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.training.baselines import Baseline
from nezha_vllm.training.metrics import ndcg

PADDING = 0


@dataclass(frozen=True)
class SasRecOptions:
    """``patience``: stop after so many epochs without a better validation NDCG@10."""

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    learning_rate: float = 1e-3
    batch_size: int = 256
    epochs: int = 200
    patience: int = 10
    max_history: int = 50
    seed: int = 0


class SasRecModel(nn.Module):
    """Item numbers [U, W] (0 = padding, items from 1) → hidden states [U, W, H]; the item embedding is the output."""

    def __init__(self, items: int, options: SasRecOptions) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, options.hidden, padding_idx=PADDING)
        self.position = nn.Embedding(options.max_history, options.hidden)
        layer = nn.TransformerEncoderLayer(
            options.hidden,
            options.heads,
            4 * options.hidden,
            options.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(options.hidden)
        self.encoder = nn.TransformerEncoder(layer, options.layers, norm, enable_nested_tensor=False)
        self.dropout = nn.Dropout(options.dropout)
        for embedding in (self.item, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, items_UW: Tensor) -> Tensor:
        # items stand at the start of a row, so causal attention alone keeps padding out
        width = items_UW.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=items_UW.device).triu(1)
        hidden_UWH = self.dropout(self.item(items_UW) + self.position.weight[:width])
        return self.encoder(hidden_UWH, mask=causal)

    def scores(self, hidden_XH: Tensor) -> Tensor:
        """Logits over the items [X, M]."""
        return hidden_XH @ self.item.weight[1:].T


class SasRec(Baseline):
    """Trained when made, on every next item of every sequence; keeps the weights that validated best.

    Args:
        histories, valid: validation items, see ``Split``.
        write: gets one line an epoch.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[str]],
        item_ids: Sequence[str],
        histories: Sequence[Sequence[str]],
        valid: Sequence[str],
        options: SasRecOptions | None = None,
        device: torch.device | str | None = None,
        write: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.options = options or SasRecOptions()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.item_ids = list(item_ids)
        self.number = {item: number for number, item in enumerate(self.item_ids, start=1)}
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            self.model = SasRecModel(len(self.item_ids), self.options).to(self.device)
            self._train(sequences, histories, valid, write)

    @torch.no_grad()
    def recommend_all(self, histories: Sequence[Sequence[str]], n: int) -> list[list[str]]:
        self.model.eval()
        found: list[list[str]] = []
        for asked in self._batches(histories):
            best_UN = self._scores(*asked).topk(min(n, len(self.item_ids))).indices
            found += [[self.item_ids[item] for item in row] for row in best_UN.tolist()]
        return found

    def _batches(self, histories: Sequence[Sequence[str]], size: int = 1024) -> list[tuple[Tensor, Tensor]]:
        """Item numbers [U, W] of each batch of histories, and where the last of a row stands [U]."""
        rows = [self._numbers(items[-self.options.max_history :]) for items in histories]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            (self._padded(part), torch.tensor([len(row) - 1 for row in part], device=self.device)) for part in parts
        ]

    def _scores(self, items_UW: Tensor, last_U: Tensor) -> Tensor:
        """Logits [U, M] of what follows each row."""
        with self._autocast():
            hidden_UWH = self.model(items_UW)
        return self.model.scores(hidden_UWH[torch.arange(len(last_U), device=self.device), last_U].float())

    @torch.no_grad()
    def _ranks(self, asked: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Tensor]) -> np.ndarray:
        self.model.eval()
        ranks = []
        for batch, target_U in zip(asked, targets, strict=True):
            scores_UM = self._scores(*batch)
            # behind those of equal score; a score that is no number is behind all
            ranks.append((~(scores_UM < scores_UM.gather(1, target_U[:, None]))).sum(1) - 1)
        return torch.cat(ranks).cpu().numpy()

    def recommend(self, history: Sequence[str]) -> list[str]:
        return self.recommend_all([history], len(self.item_ids))[0]

    def _train(
        self,
        sequences: Sequence[Sequence[str]],
        histories: Sequence[Sequence[str]],
        valid: Sequence[str],
        write: Callable[[str], None],
    ) -> None:
        options, width = self.options, self.options.max_history
        numbers = [self._numbers(items) for items in sequences]
        # pieces overlap by one item, so that every item but a sequence's first is a target once
        pieces = [row[start : start + width + 1] for row in numbers for start in range(0, len(row) - 1, width)]
        if not pieces:
            raise ValueError("no training sequence has two items, so there is no next item to learn")
        rows = self._padded(pieces)  # on the device for good: an epoch is one permutation of it
        optimizer = torch.optim.AdamW(self.model.parameters(), options.learning_rate, (0.9, 0.98), weight_decay=0.01)
        asked = self._batches(histories)
        targets = (torch.tensor(self._numbers(valid), device=self.device) - 1).split(
            [len(last_U) for _, last_U in asked]
        )
        best, best_epoch, weights = -1.0, 0, deepcopy(self.model.state_dict())
        for epoch in range(1, options.epochs + 1):
            self.model.train()
            total = torch.zeros((), device=self.device)
            batches = torch.randperm(len(rows)).to(self.device).split(options.batch_size)
            for batch in batches:
                loss = self._loss(rows[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            found = ndcg(self._ranks(asked, targets), 10)
            write(
                f"SASRec epoch {epoch}: training loss {float(total) / len(batches):.4f}  validation ndcg@10 {found:.4f}"
            )
            if found > best:
                best, best_epoch, weights = found, epoch, deepcopy(self.model.state_dict())
            elif epoch - best_epoch >= options.patience:
                break
        self.model.load_state_dict(weights)

    def _loss(self, row_UW: Tensor) -> Tensor:
        inputs, targets = row_UW[:, :-1], row_UW[:, 1:]
        real = targets != PADDING
        with self._autocast():
            scores_XM = self.model.scores(self.model(inputs)[real])
        return F.cross_entropy(scores_XM.float(), targets[real] - 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _numbers(self, items: Sequence[str]) -> list[int]:
        return [self.number[item] for item in items]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        padded = torch.full((len(rows), max(map(len, rows))), PADDING)
        for at, row in enumerate(rows):
            padded[at, : len(row)] = torch.tensor(row)
        return padded.to(self.device)
