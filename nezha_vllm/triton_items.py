"""`ItemScores` as launches behind a Triton search: they hang on the model alone, not on a catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from nezha_vllm.kernels.items import item_products, rank_items
from nezha_vllm.search_memory import BeamRows

if TYPE_CHECKING:
    from nezha_vllm.item_scores import ItemScores

TABLE_BITS = 21  # 8 MB of lower bounds; a search in all of 57,288 keys would be 16 loads, one waiting for the other
BEAMS = 4  # of a program: 512 beams are 128 of them


class ItemKernels:
    """What `item_products` reads, made once a model. Products go to where log-probabilities are: no buffers."""

    def __init__(self, scores: ItemScores) -> None:
        assert scores.embeddings.is_contiguous(), "kernels count on rows of H numbers"
        self.scores, codec, device = scores, scores.codec, scores.keys.device
        self.shift = max(0, (codec.capacity - 1).bit_length() - TABLE_BITS)
        lows = torch.arange(1 + (codec.capacity - 1 >> self.shift), device=device) << self.shift
        bounds = torch.searchsorted(scores.keys, lows, out_int32=True)
        self.table = torch.cat([bounds, bounds.new_tensor([len(scores.keys)])])
        levels = zip(scores.code_starts, codec.suffix_sizes, codec.codebook_sizes, strict=True)
        self.levels = torch.tensor([list(level) for level in levels], device=device)

    def __call__(self, hidden_NSH: Tensor, beams: BeamRows, out: Tensor, width: int) -> None:
        """Add the products to the beams' last log-probabilities and write the answer, see `pack_answer`."""
        num_requests, num_states, hidden_size = hidden_NSH.shape
        scores = self.scores
        assert scores.embeddings.shape[1] == hidden_size, "items and histories are of one model"
        block = min(2048, triton.next_power_of_2(hidden_size))
        item_products[(num_requests * width // BEAMS,)](
            hidden_NSH,
            scores.embeddings,
            scores.code_rows,
            scores.keys,
            self.table,
            self.levels,
            beams.counts,
            beams.prefixes,
            beams.lows,
            beams.highs,
            beams.history,
            scores.weight,
            scores.first,
            self.shift,
            K=width,
            L=num_states - 1,
            H=hidden_size,
            BEAMS=BEAMS,
            BLOCK_H=block,
            num_warps=max(1, block // 512),  # six programs of 80 registers, and so 96 KB on their way, a multiprocessor
        )
        rank_items[(num_requests,)](
            beams.counts,
            beams.lows,
            beams.highs,
            beams.history,
            out,
            out.stride(0),
            K=width,
            L=num_states - 1,
            num_warps=min(16, max(4, width // 128)),
        )
