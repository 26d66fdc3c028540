"""What a student is taught beside the true items: a distribution over items, and what it says of every level's codes.

With A the teachers' weight and p the mean of their softmaxes, the item loss of a target is (1 - A) · CE(true item) +
A · CE(p), and that of level l is (1 - A) · CE(true code) + A · CE(p_l), p_l what p gives to its codes among items that
share the target's codes before it. Shapes as in ``hf.modeling``; I items that have a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nezha_vllm.item_tokens import ItemTokens

SMALLEST = torch.finfo(torch.float32).tiny  # of a mass that can be shared out


class Codes:
    """Of the items that have a token, level by level: the codes before and with it [I], its own code [I]."""

    def __init__(self, tokens: ItemTokens, device: torch.device) -> None:
        codec, keys_I = tokens.codec, torch.from_numpy(tokens.keys).to(device)
        self.sizes, self.suffixes = codec.codebook_sizes, torch.tensor(codec.suffix_sizes, device=device)
        self.prefixes = [keys_I // suffix for suffix in codec.suffix_sizes]
        self.own = [prefix % size for prefix, size in zip(self.prefixes, self.sizes, strict=True)]


@dataclass(frozen=True)
class Lesson:
    """What the teachers give to the items of a batch's targets, float32 [V, I], and A, its weight."""

    p_VI: Tensor
    weight: float
    codes: Codes

    @torch.no_grad()
    def of_codes(self, codes_VL: Tensor) -> list[Tensor]:
        """Of p, what goes to each code of a level [V, T_l] behind the target's codes before it; sums may be below 1."""
        key_V, codes, p_VI, found = (codes_VL * self.codes.suffixes).sum(1), self.codes, self.p_VI, []
        for level, size in enumerate(codes.sizes):
            if level:
                prefix_V1 = (key_V // codes.suffixes[level - 1])[:, None]
                p_VI = p_VI * (prefix_V1 == codes.prefixes[level - 1])
            found.append(p_VI.new_zeros(len(p_VI), size).index_add_(1, codes.own[level], p_VI))
        return found

    def mixed(self, loss_V: Tensor, log_p_VT: Tensor, share_VT: Tensor) -> Tensor:
        """(1 - A) · ``loss_V`` + A · cross-entropy to the shares, made to sum to 1 over the codes that are possible.

        ``loss_V`` alone where these have no share.
        """
        possible_VT = log_p_VT > -torch.inf
        share_VT = share_VT.where(possible_VT, 0)
        mass_V = share_VT.sum(1)
        taught_V = -(share_VT * log_p_VT.where(possible_VT, 0)).sum(1) / mass_V.clamp(min=SMALLEST)
        return torch.where(mass_V >= SMALLEST, (1 - self.weight) * loss_V + self.weight * taught_V, loss_V)
