"""Lower bounds of the draft stage's time, from what it must move and multiply. Nothing here runs anything.

A kernel's bytes are its inputs read once and its outputs written once. What lies between two kernels may never leave
the L2 cache, so a kernel can beat its own floor when warm; the floor of the whole stage counts weights, hidden states
and answers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT = 4  # logits, log-probabilities and what a request brings to each level are float32


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this very run: a large copy, read and write counted; a large matrix product."""

    gb_per_s: float
    tflop_per_s: float


@dataclass(frozen=True)
class Work:
    """Bytes that must be moved and operations of matrix products."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor_us(self, ceilings: Ceilings) -> float:
        """Microseconds if moving and multiplying overlap perfectly."""
        return max(self.bytes / ceilings.gb_per_s / 1e3, self.flops / ceilings.tflop_per_s / 1e6)


@dataclass(frozen=True)
class Search:
    """N requests of K beams. ``prefixes`` are the catalogue's different prefixes after each level; () means all.

    ``with_token`` is the share of the items that have a token where there are item scores, None where there are none.
    """

    requests: int
    width: int
    sizes: tuple[int, ...]
    hidden: int
    number_bytes: int = 2
    prefixes: tuple[int, ...] = ()
    with_token: float | None = None

    def beams(self, level: int) -> int:
        """Beams of a request behind ``level`` levels, at most; one, the root, behind none."""
        if level == 0:
            return 1
        known = self.prefixes[level - 1] if self.prefixes else math.prod(self.sizes[:level])
        return min(self.width, known)

    def distinct(self, level: int) -> int:
        """Fewest different codes that the beams behind ``level`` levels can end with, and fewest different parents."""
        return math.ceil(self.beams(level) / self.beams(level - 1))

    @property
    def last(self) -> int:
        return len(self.sizes) - 1


def request_products(search: Search) -> Work:
    """W_1 (h_0 + h_1), W_hh,1 h_0 and W_l h_l: weights and states once, float32 results."""
    rows = sum(search.sizes) + (search.hidden if search.last else 0)
    weights = rows * search.hidden * search.number_bytes
    states = search.requests * (len(search.sizes) + 1) * search.hidden * search.number_bytes
    return Work(weights + states + search.requests * rows * FLOAT, 2 * search.requests * rows * search.hidden)


def beam_products(search: Search, level: int) -> Work:
    """W_l s and, but at the last level, W_hh,l s for all beams of ``level`` (from 0, so 1 is the first that has it)."""
    beams, hidden, size = search.requests * search.beams(level), search.hidden, search.sizes[level]
    drives = 0 if level == search.last else hidden
    weights = (size + drives) * hidden * search.number_bytes
    states = beams * hidden * search.number_bytes
    out = beams * (size * FLOAT + drives * search.number_bytes)
    return Work(weights + states + out, 2 * beams * hidden * (size + drives))


def score_children(search: Search, level: int, table: bool = False) -> Work:
    """Logits once, log-probabilities once, and with a prefix table a range of bounds a beam. No matrix product.

    Binary search is not counted: how far it reads depends on the catalogue.
    """
    beams, size = search.requests * search.beams(level), search.sizes[level]
    shared = 0 if level == 0 else search.requests * size * FLOAT  # W_l h_l, added to every beam of the request
    return Work(2 * beams * size * FLOAT + shared + (beams * (size + 1) * FLOAT if table else 0))


def select_beams(search: Search, level: int, groups: int, fan: int) -> Work:
    """Maxima of all groups, then of the chunks of K groups, then K chunks; one row of 24 bytes a child.

    One program a request: where requests are few, latency is its bound and not this.
    """
    parents, children = search.beams(level), search.beams(level + 1)
    looked_at = parents * groups + 2 * min(search.width, parents * groups) * fan
    answer = 2 + children * (1 + len(search.sizes)) if level == search.last else 0
    return Work(search.requests * ((looked_at + answer) * FLOAT + children * 24))


def context_states(search: Search, level: int) -> Work:
    """The next states, and what they are made of: rows of code drives and of the parents' drives, no row twice."""
    row = search.hidden * search.number_bytes
    parent_row = search.hidden * (FLOAT if level == 0 else search.number_bytes)
    children = search.requests * search.beams(level + 1) * row
    parents = search.requests * math.ceil(search.beams(level + 1) / search.sizes[level]) * parent_row
    return Work(children + parents + search.distinct(level + 1) * row)


def vectors(search: Search) -> int:
    """Bytes of the items' vectors as if no request shared an item with another; those of codes once."""
    beams = search.requests * search.beams(len(search.sizes))
    share = search.with_token or 0.0
    codes = 0 if share == 1 else min(sum(search.sizes), math.ceil((1 - share) * beams) * len(search.sizes))
    return (math.ceil(share * beams) + codes) * search.hidden * search.number_bytes


def item_products(search: Search) -> Work:
    """Vectors and h_0 once; of a beam its key, range of keys and log-probability, which is written, too."""
    states = search.requests * search.hidden * search.number_bytes
    return Work(vectors(search) + states + search.requests * search.beams(len(search.sizes)) * (16 + 2 * FLOAT))


def rank_items(search: Search) -> Work:
    """Ranges of keys and log-probabilities of all beams once, and the answer."""
    beams, levels = search.beams(len(search.sizes)), len(search.sizes)
    return Work(search.requests * FLOAT * (beams * (2 + levels) + 2 + beams * (1 + levels)))


def stage(search: Search) -> Work:
    """The whole draft stage if nothing but weights, hidden states and answers ever went to memory.

    All weights once, W_l and W_hh,l; the fewest rows of code drives; the operations of both kinds of products. With
    item scores their vectors, too.
    """
    row = search.hidden * search.number_bytes
    inner = range(search.last)
    weights = (sum(search.sizes) + len(inner) * search.hidden) * row
    drives = sum(search.distinct(level + 1) for level in inner) * row
    states = search.requests * (len(search.sizes) + 1) * row
    answers = search.requests * (2 + search.beams(len(search.sizes)) * (1 + len(search.sizes))) * 4
    flops = request_products(search).flops + sum(beam_products(search, 1 + level).flops for level in inner)
    items = 0 if search.with_token is None else vectors(search)
    return Work(weights + drives + states + answers + items, flops)
