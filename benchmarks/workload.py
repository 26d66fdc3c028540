"""Requests: random histories of real catalogue items, of a given number of tokens, none like another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nezha_vllm.catalogue import Catalogue
from nezha_vllm.semantic_id import code_token


@dataclass(frozen=True)
class Cell:
    """One point of a grid: prompt size asked for, beam width K, n items wanted."""

    prompt_tokens: int
    beam_width: int
    n: int


def parse_beams(text: str) -> tuple[int, int]:
    """``512:50`` is a beam width of 512 and 50 items; ``512`` wants all 512, as stock beam search returns them."""
    width, _, n = text.partition(":")
    found = int(width), int(n or width)
    if not 1 <= found[1] <= found[0]:
        raise ValueError(f"{text}: write K or K:n with 1 ≤ n ≤ K")
    return found


def grid(system: str, prompts: Sequence[int], beams: Sequence[tuple[int, int]]) -> list[Cell]:
    """The cells in which a system differs: stock beam search returns all K beams, one token needs no beams."""
    cells: dict[Cell, None] = {}
    for prompt in prompts:
        for width, n in beams:
            answered = {"vllm-one-token": (1, 1), "vllm-beam": (width, width), "hf-beam": (width, width)}
            cells[Cell(prompt, *answered.get(system, (width, n)))] = None
    return list(cells)


@dataclass(frozen=True)
class Workload:
    """A NEZHA checkpoint's catalogue as a source of histories; the same ``seed`` gives the same ones."""

    config: dict[str, Any]
    catalogue: Catalogue

    @classmethod
    def of(cls, checkpoint: str | Path) -> Workload:
        config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
        if "codebook_sizes" not in config:
            raise ValueError(f"{checkpoint} is no NEZHA checkpoint; make one with `nezha init`")
        return cls(config, Catalogue.load(Path(checkpoint) / config["catalogue"]))

    @property
    def levels(self) -> int:
        return len(self.config["codebook_sizes"])

    def history_items(self, prompt_tokens: int) -> int:
        """How many items bring a prompt, its L placeholders included, closest to ``prompt_tokens``; at least one."""
        return max(1, round((prompt_tokens - self.levels) / self.levels))

    def engine_tokens(self, prompt_tokens: int) -> int:
        """Tokens of such a prompt, placeholders included."""
        return self.levels * (self.history_items(prompt_tokens) + 1)

    def histories(self, prompt_tokens: int, seed: int = 0) -> Iterator[np.ndarray]:
        """Endless rows of the catalogue, [items], drawn uniformly: no two share a prefix but by chance."""
        generator = np.random.default_rng([seed, prompt_tokens])
        while True:
            yield generator.integers(0, self.catalogue.num_items, self.history_items(prompt_tokens))

    def token_ids(self, prompt_tokens: int, seed: int = 0) -> Iterator[list[int]]:
        """Endless histories as token ids, without placeholders: what every system is given offline."""
        offsets = np.asarray(self.config["code_token_offsets"])
        for rows in self.histories(prompt_tokens, seed):
            yield (self.catalogue.codes[rows] + offsets).ravel().tolist()

    @cached_property
    def item_texts(self) -> list[str]:
        """Per row what a NEZHA client sends for it."""
        return [f"<item:{self.catalogue.item_id(row)}>" for row in range(self.catalogue.num_items)]

    @cached_property
    def code_texts(self) -> list[str]:
        """Per row its codes as text: the same tokens for a server that knows no catalogue."""
        return ["".join(code_token(level, code) for level, code in enumerate(codes)) for codes in self._codes()]

    def _codes(self) -> list[list[int]]:
        codes: list[list[int]] = self.catalogue.codes.tolist()
        return codes
