"""Versions of a catalogue whose answers cannot be taken for each other's, and what each of them answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nezha_vllm.catalogue import Catalogue

TOLERANCE = 1e-4  # on scores, in float32
Ranking = Sequence[tuple[str, float]]


def versions_of(catalogue: Catalogue, names: Sequence[str], keep: Sequence[str] = ()) -> list[Catalogue]:
    """Each without a tenth of the items, with other codes for a third of them, and with new items.

    The new items have semantic IDs that no item of the catalogue has. As histories mean other codes in each version, an
    answer made of two is one of neither.

    Args:
        names: of the versions.
        keep: items that all of them have.
    """
    ids, found = np.array(catalogue.ids.to_pylist(), object), []
    sizes = catalogue.codec.codebook_sizes
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        codes = catalogue.codes.copy()
        moved = rng.random(len(codes)) < 1 / 3
        codes[moved] = np.stack([rng.integers(0, size, moved.sum()) for size in sizes], axis=1)
        kept = (rng.random(len(codes)) < 0.9) | np.isin(ids, list(keep))
        drawn = rng.integers(0, catalogue.codec.capacity, len(codes) // 4)
        new = np.unique(drawn[~np.isin(drawn, catalogue.keys)])
        all_ids = [*ids[kept], *(f"new-in-{name}-{place}" for place in range(len(new)))]
        all_codes = np.concatenate([codes[kept], catalogue.codec.codes_of_key(new)])
        segments = {segment: rng.random(len(all_ids)) < 0.5 for segment in catalogue.segments.names}
        found.append(Catalogue.build(all_ids, all_codes, sizes, segments=segments, version=name))
    return found


def rankings(
    checkpoint: Path, catalogues: Sequence[Catalogue], histories: Sequence[Sequence[str]], n: int
) -> dict[str, list[Ranking]]:
    """What each version answers to each history, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from nezha_vllm.hf.modeling import register_models
    from nezha_vllm.hf.recommend import recommend

    register_models()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return {
        catalogue.version: [
            [(item.item_id, item.score) for item in recommend(model, [history], n, catalogue=catalogue)[0]]
            for history in histories
        ]
        for catalogue in catalogues
    }


def difference(found: Ranking, expected: Ranking, tolerance: float = TOLERANCE) -> str | None:
    """What is wrong with an answer; items may change places where their scores are as good as equal."""
    if len(found) != len(expected):
        return f"{len(found)} items instead of {len(expected)}"
    last = expected[-1][1]
    for rank, ((item, score), (other, reference)) in enumerate(zip(found, expected, strict=True)):
        if abs(score - reference) > tolerance:
            return f"rank {rank}: score {score} instead of {reference}"
        near = {name for name, value in expected if abs(value - reference) <= 2 * tolerance}
        if item != other and item not in near and abs(last - reference) > 2 * tolerance:
            return f"rank {rank}: {item} instead of {other}"
    return None
