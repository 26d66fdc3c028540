"""RQ-VAE (Zeghidour et al. 2021; TIGER, arXiv 2305.05065): an autoencoder whose latent is quantised level by level.

Residual k-means quantises the features as they are; here encoder and codebooks are trained together, to reconstruct the
features. Three things keep it from collapsing to a handful of codes: inputs of unit scale, codebooks that start as
residual k-means of the first latents, and codes that no item used in an epoch moved to where items are badly served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nezha_vllm.tokenize.residual_kmeans import Quantized, residual_kmeans


@dataclass(frozen=True)
class RqVaeOptions:
    """Shape and training; widths are those of the encoder, the decoder has them in reverse."""

    widths: tuple[int, ...] = (256, 128)
    latent: int = 32
    epochs: int = 200
    batch_size: int = 1024
    learning_rate: float = 1e-3
    commitment: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class RqVaeQuantized(Quantized):
    """Centres and residuals are those of the latents."""

    decode: Callable[[np.ndarray], np.ndarray]

    def variance_kept(self, features: np.ndarray, codes: np.ndarray) -> float:
        """1 - squared distance of the items to what is decoded from their codes, over the features' variance."""
        latent = sum(centre[column] for centre, column in zip(self.centres, codes.T, strict=True))
        total = float((features**2).sum())
        return 1 - float(((features - self.decode(latent)) ** 2).sum()) / total if total else 1.0


class RqVae(nn.Module):
    def __init__(self, features: int, codebook_sizes: Sequence[int], options: RqVaeOptions) -> None:
        super().__init__()
        widths = [features, *options.widths, options.latent]
        self.encoder, self.decoder = _layers(widths), _layers(widths[::-1])
        self.codebooks = nn.ParameterList(torch.empty(size, options.latent) for size in codebook_sizes)

    def quantise(self, latent_NF: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Codes [N, L]; per level the residual before it and the centre chosen, [N, F] each."""
        residual, codes, residuals, centres = latent_NF, [], [], []
        for codebook in self.codebooks:
            code_N = torch.cdist(residual.detach(), codebook.detach()).argmin(1)
            codes.append(code_N)
            residuals.append(residual)
            centres.append(codebook[code_N])
            residual = residual - centres[-1].detach()
        return torch.stack(codes, dim=1), residuals, centres

    def loss(self, features_NX: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
        """Reconstruction, codebook and commitment losses in one; and the codes [N, L]."""
        latent = self.encoder(features_NX)
        codes, residuals, centres = self.quantise(latent)
        quantised = sum(centre.detach() for centre in centres)
        straight_through = latent + (quantised - latent).detach()
        loss = F.mse_loss(self.decoder(straight_through), features_NX)
        for residual, centre in zip(residuals, centres, strict=True):
            loss = loss + F.mse_loss(centre, residual.detach()) + commitment * F.mse_loss(residual, centre.detach())
        return loss, codes


def _layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rqvae(
    features: np.ndarray,
    codebook_sizes: Sequence[int],
    options: RqVaeOptions | None = None,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> RqVaeQuantized:
    """Quantise features [items, X]; deterministic by seed on one machine. ``on_epoch(e)`` is called after each."""
    options = options or RqVaeOptions()
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not len(features) or not np.isfinite(features).all():
        raise ValueError("features must be finite numbers [items, F] with at least one item")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    centre = features.mean(0)
    # one scale for all columns, as in `features.standardised`: trailing components are mostly noise and stay small
    scale = max(float(np.sqrt(((features - centre) ** 2).mean())), 1e-12)
    inputs = torch.from_numpy((features - centre) / scale).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = RqVae(features.shape[1], codebook_sizes, options).to(device)
        _start_codebooks(model, inputs, options.seed)
        _train(model, inputs, options, on_epoch)
    with torch.no_grad():
        latent = model.encoder(inputs)
        codes, residuals, _ = model.quantise(latent)

    @torch.no_grad()
    def decode(latents: np.ndarray) -> np.ndarray:
        return model.decoder(torch.from_numpy(latents).to(device)).cpu().numpy() * scale + centre

    books = [codebook.detach().cpu().numpy() for codebook in model.codebooks]
    return RqVaeQuantized(codes.cpu().numpy(), books, residuals[-1].cpu().numpy(), decode)


@torch.no_grad()
def _start_codebooks(model: RqVae, inputs: Tensor, seed: int) -> None:
    latent = model.encoder(inputs).cpu().numpy()
    started = residual_kmeans(latent, [len(codebook) for codebook in model.codebooks], seed=seed)
    for codebook, centres in zip(model.codebooks, started.centres, strict=True):
        spread = float(centres.std()) + 1e-6
        # codes that k-means had no items for stand near others; they are moved when they stay unused
        rows = torch.randint(len(centres), (len(codebook),))
        codebook.copy_(torch.from_numpy(centres)[rows] + 0.01 * spread * torch.randn(codebook.shape))
        codebook[: len(centres)] = torch.from_numpy(centres).to(codebook.device)


def _train(model: RqVae, inputs: Tensor, options: RqVaeOptions, on_epoch: Callable[[int], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=1e-4)
    for epoch in range(options.epochs):
        used = [torch.zeros(len(codebook), dtype=torch.bool, device=inputs.device) for codebook in model.codebooks]
        for batch in torch.randperm(len(inputs)).to(inputs.device).split(options.batch_size):
            loss, codes_NL = model.loss(inputs[batch], options.commitment)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for level, mask in enumerate(used):
                mask[codes_NL[:, level]] = True
        if epoch < options.epochs * 3 // 4:  # the last quarter settles
            _revive(model, inputs, used, options.batch_size)
        on_epoch(epoch)


@torch.no_grad()
def _revive(model: RqVae, inputs: Tensor, used: Sequence[Tensor], count: int) -> None:
    """Move unused codes to residuals of items drawn by how far they are from their own code."""
    sample = torch.randperm(len(inputs))[:count].to(inputs.device)
    _, residuals, centres = model.quantise(model.encoder(inputs[sample]))
    for codebook, residual, centre, mask in zip(model.codebooks, residuals, centres, used, strict=True):
        dead = (~mask).nonzero()[:, 0]
        error = ((residual - centre) ** 2).sum(1)
        candidates = int((error > 0).sum())
        if len(dead) and candidates:
            dead = dead[:candidates]
            codebook[dead] = residual[torch.multinomial(error, len(dead))]
