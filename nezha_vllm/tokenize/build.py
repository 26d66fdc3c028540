"""From a prepared data set to a catalogue: features, residual k-means, shared IDs, report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nezha_vllm.catalogue import RESERVED_COLUMNS, Catalogue
from nezha_vllm.data.dataset import Dataset
from nezha_vllm.data.progress import progress_bars
from nezha_vllm.semantic_id import SemanticIdCodec
from nezha_vllm.tokenize.features import FeatureOptions, item_features
from nezha_vllm.tokenize.report import Report
from nezha_vllm.tokenize.residual_kmeans import residual_kmeans
from nezha_vllm.tokenize.shared_ids import resolve


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
    dataset: Dataset, codebook_sizes: Sequence[int], options: FeatureOptions, *, resolve_shared: bool = True
) -> Tokenized:
    """Semantic IDs for every item of ``dataset``. Items on one ID rank by how often training users met them.

    Raises ``ValueError`` for sizes that span 2^63 IDs or more, or features that cannot be made.
    """
    SemanticIdCodec(codebook_sizes)
    started = time.perf_counter()
    features, described = item_features(dataset, options)
    with progress_bars() as progress:
        bar = progress.add_task("residual k-means", total=len(codebook_sizes))
        quantized = residual_kmeans(
            features, codebook_sizes, seed=options.seed, on_level=lambda level: progress.advance(bar)
        )
        codes = quantized.codes
        if resolve_shared:
            codes = resolve(codes, quantized.last_level_cost)
    provenance = {
        "dataset": dataset.name,
        "features": described,
        "items_moved": int((codes != quantized.codes).any(axis=1).sum()),
        "share_of_variance_kept": round(quantized.variance_kept(features, codes), 4),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Tokenized(
        _catalogue(dataset, codes, codebook_sizes),
        Report.of(quantized.codes, codebook_sizes),
        Report.of(codes, codebook_sizes),
        provenance,
    )


def _catalogue(dataset: Dataset, codes: np.ndarray, codebook_sizes: Sequence[int]) -> Catalogue:
    met = Counter(item for items in dataset.split().train for item in items)
    metadata = {
        f"item_{name}" if name in RESERVED_COLUMNS else name: dataset.items[name].to_pylist()
        for name in dataset.items.column_names
        if name not in ("item_id", "text")
    }
    weights = [float(met[item]) for item in dataset.item_ids]
    return Catalogue.build(dataset.item_ids, codes, codebook_sizes, metadata=metadata, weights=weights)
