"""From a prepared data set to a catalogue: features, quantisation, shared IDs, report; or from an index file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from nezha_vllm.catalogue import RESERVED_COLUMNS, Catalogue
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.data.progress import progress_bars
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.tokenize.features import FeatureOptions, item_features
from nezha_vllm.tokenize.index_files import codes_by_item, read_index, smallest_sizes
from nezha_vllm.tokenize.report import Report, neighbour_prefixes
from nezha_vllm.tokenize.residual_kmeans import Quantized, residual_kmeans
from nezha_vllm.tokenize.shared_ids import extra_level, resolve

QUANTIZERS = ("kmeans", "rqvae")


@dataclass(frozen=True)
class Tokenized:
    """A catalogue, the reports before and after shared IDs were resolved, and how it was made."""

    catalogue: Catalogue
    nearest: Report
    resolved: Report
    provenance: dict[str, Any]

    def report_json(self) -> str:
        report = self.resolved.as_dict() | {"nearest_codes": self.nearest.as_dict()} | self.provenance
        return json.dumps({"catalogue_version": self.catalogue.version} | report, indent=2) + "\n"


def report_path(out: str | os.PathLike[str]) -> Path:
    """Where the report of the catalogue folder ``out`` goes: beside it."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}-report.json")


def tokenize(
    dataset: Dataset,
    codebook_sizes: Sequence[int],
    options: FeatureOptions,
    *,
    resolve_shared: bool = True,
    add_level: bool = False,
    quantizer: str = "kmeans",
) -> Tokenized:
    """Semantic IDs for every item of ``dataset``. Items on one ID rank by how often training users met them.

    Args:
        resolve_shared: deal the last level's codes anew, so that items differ as far as its size allows.
        add_level: number the items of one ID at a level of their own instead; there is none if all IDs differ.
        quantizer: one of ``QUANTIZERS``.

    Raises ``ValueError`` for sizes that span 2^63 IDs or more, or features that cannot be made.
    """
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {QUANTIZERS}, got {quantizer!r}")
    SemanticIdCodec(codebook_sizes)
    started = time.perf_counter()
    features, described = item_features(dataset, options)
    with progress_bars() as progress:
        quantized = _quantized(features, codebook_sizes, options.seed, quantizer, progress)
        codes = quantized.codes
        if resolve_shared and not add_level:
            codes = resolve(codes, quantized.last_level_cost)
    moved, kept = (codes != quantized.codes).any(axis=1).sum(), quantized.variance_kept(features, codes)
    sizes = list(codebook_sizes)
    if add_level:
        codes = extra_level(codes, np.array(_weights(dataset)))
        sizes += [int(codes[:, -1].max()) + 1] if codes.shape[1] > len(sizes) else []
        SemanticIdCodec(sizes)  # refuses a product that is too large
    provenance = {
        "dataset": dataset.name,
        "features": described,
        "quantizer": quantizer,
        "items_moved": int(moved),
        "share_of_variance_kept": round(kept, 4),
        "neighbour_prefixes": neighbour_prefixes(features, codes, options.seed),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Tokenized(
        _catalogue(dataset, codes, sizes),
        Report.of(quantized.codes, codebook_sizes),
        Report.of(codes, sizes),
        provenance,
    )


def imported(dataset: Dataset, codebook_sizes: Sequence[int] | None, index_file: Path, offset: int = 0) -> Tokenized:
    """The semantic IDs of an index file, as they are, for every item of ``dataset``.

    Args:
        codebook_sizes: None for the least power of two that holds every code.
        offset: added to the item IDs of the file.

    Raises ``ValueError`` for a file that cannot be read, lacks items, or has codes beyond the sizes.
    """
    index_ids, index_codes = read_index(index_file, offset)
    codes = codes_by_item(dataset.item_ids, index_ids, index_codes, index_file)
    sizes = smallest_sizes(index_codes) if codebook_sizes is None else list(codebook_sizes)
    SemanticIdCodec(sizes).check_codes(codes)
    report = Report.of(codes, sizes)
    digest = hashlib.sha256(index_file.read_bytes()).hexdigest()[:12]
    provenance = {"dataset": dataset.name, "index": index_file.name, "index_sha256": digest, "index_offset": offset}
    return Tokenized(_catalogue(dataset, codes, sizes), report, report, provenance)


def _quantized(features: np.ndarray, sizes: Sequence[int], seed: int, quantizer: str, progress: Progress) -> Quantized:
    if quantizer == "kmeans":
        bar = progress.add_task("residual k-means", total=len(sizes))
        return residual_kmeans(features, sizes, seed=seed, on_level=lambda level: progress.advance(bar))
    from nezha_vllm.tokenize.rqvae import RqVaeOptions, rqvae

    training = RqVaeOptions(seed=seed)
    bar = progress.add_task("RQ-VAE", total=training.epochs)
    return rqvae(features, sizes, training, on_epoch=lambda epoch: progress.advance(bar))


def _weights(dataset: Dataset) -> list[float]:
    """How often training users met each item."""
    met = Counter(item for items in dataset.split().train for item in items)
    return [float(met[item]) for item in dataset.item_ids]


def _catalogue(dataset: Dataset, codes: np.ndarray, codebook_sizes: Sequence[int]) -> Catalogue:
    metadata = {
        f"item_{name}" if name in RESERVED_COLUMNS else name: dataset.items[name].to_pylist()
        for name in dataset.items.column_names
        if name not in ("item_id", "text")
    }
    return Catalogue.build(dataset.item_ids, codes, codebook_sizes, metadata=metadata, weights=_weights(dataset))
