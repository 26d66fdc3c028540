"""Versions of a catalogue whose answers cannot be taken for each other's, and what each of them answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nezha_vllm.catalogue import Catalogue

TOLERANCE = 1e-4  # on scores, in float32
BATCH = 16  # histories at once
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
    checkpoint: Path,
    catalogues: Sequence[Catalogue],
    histories: Sequence[Sequence[str]],
    n: int,
    beam_width: int | None = None,
    dtype: str = "float32",
) -> dict[str, list[Ranking]]:
    """What each version answers to each history, by transformers and PyTorch's operations; on a GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    from nezha_vllm.hf.modeling import register_models
    from nezha_vllm.hf.recommend import recommend

    register_models()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def answers(catalogue: Catalogue) -> Iterator[Ranking]:
        for at in range(0, len(histories), BATCH):
            some = histories[at : at + BATCH]
            for items in recommend(model, some, n, catalogue=catalogue, beam_width=beam_width, kernels=False):
                yield [(item.item_id, item.score) for item in items]

    return {catalogue.version: list(answers(catalogue)) for catalogue in catalogues}


def difference(
    found: Ranking,
    expected: Ranking,
    tolerance: float = TOLERANCE,
    n: int | None = None,
    sure: Collection[str] | None = None,
) -> str | None:
    """What is wrong with an answer of ``n`` items, by default as many as expected.

    Items whose scores are as good as equal may change places. That goes for the last place too, so that with a large
    tolerance only more expected items than ``n`` say which ones may come in.

    Args:
        sure: expected items that no other rounding can lose; without it all of them are.
    """
    n = min(len(expected), n or len(expected))
    if len(found) != n:
        return f"{len(found)} items instead of {n}"
    names, scores = [item for item, _ in found], [score for _, score in found]
    if len(set(names)) < n or any(below > above for above, below in pairwise(scores)):
        return f"twice the same item, or not in the order of their scores: {found}"
    known = dict(expected)
    for rank, (item, score) in enumerate(found):
        if item not in known and score > expected[-1][1] + tolerance:
            return f"rank {rank}: {item}, which is not among the {len(expected)} best"
        if abs(score - known.get(item, score)) > tolerance:
            return f"rank {rank}: {item} with {score} instead of {known[item]}"
    for item, score in expected:
        if item not in names and score > scores[-1] + tolerance and (sure is None or item in sure):
            return f"{item} with {score} is missing"
    return None
