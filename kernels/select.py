"""The K best of a level's candidates, exactly, and what becomes of them.

A request's candidates lie in chunks of FAN codes, and those in groups of FAN chunks, whose maxima are known. The K best
candidates lie in the K groups with the largest maxima (those equal by position), since each of these holds a candidate
at least as good as any outside; so do chunks. One program a request picks K groups, then K of their chunks, then K of
their candidates. Each pick is exact and in position order, which keeps beams in key order from level to level.
"""

import triton
import triton.language as tl

from .order import DEAD, FINITE, ordered, ordered_at, places, threshold
from .validity import any_eligible, catalogue_of, child_range, rule_of


@triton.jit
def position(chosen, at, exists, stage, FAN: tl.constexpr):
    """Where the ``at``-th value looked at stands: itself at first, then below the ``at // FAN``-th of those chosen."""
    below = tl.load(chosen + at // FAN, mask=exists & (stage > 0), other=0) * FAN + at % FAN
    return tl.where(stage > 0, below, at)


@triton.jit
def pick(
    values, count, width, floor, above, chosen, stage,
    FAN: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Positions of the ``width`` best of values[:count] into ``chosen``, ascending; returns how many there are.

    ``above`` are the positions chosen one stage before, each of which brought FAN values. Returned is also the floor of
    the next stage: each of ``width`` values brings one that is as good.
    """
    bound, ties, kept = threshold(values, count, width, floor, BLOCK, ONE)
    above_before = tl.full([], 0, tl.int32)
    tied_before = tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        keys = ordered_at(values, start, count, BLOCK)
        keep, place, above_before, tied_before = places(keys, bound, ties, above_before, tied_before, ONE)
        at = start + tl.arange(0, BLOCK)
        tl.store(chosen + place, position(above, at, keep, stage, FAN), mask=keep)
    tl.debug_barrier()
    last = bound + (ties == 0).to(tl.int32)
    return kept, tl.where(kept == width, last, floor)


@triton.jit
def gather(source, scores, chosen, count, values, row_size, stage, FAN: tl.constexpr, BLOCK: tl.constexpr):
    """What is below the chosen into ``values``: maxima of chunks at stage 1, scores of candidates at stage 2."""
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        exists = at < count
        place = position(chosen, at, exists, stage, FAN)
        value = tl.load(source + place, mask=exists, other=float("-inf"))
        value += tl.load(scores + place // row_size, mask=exists & (stage == 2), other=0.0)
        tl.store(values + at, value, mask=exists)
    tl.debug_barrier()


@triton.jit
def pack_answer(valid, total, kept, lows, history, request, out, out_stride, K: tl.constexpr, L: tl.constexpr):
    """A request's row of ``out``, int32 [2 + K · (1 + L)]: how many beams are items, how many were finished, and best
    first each beam's index among the keys (-1 where there is none) and the bits of its log-probabilities.

    ``valid`` and ``total`` [K] say which beams are items and what they are sorted by.
    """
    first = request.to(tl.int64) * K
    beam = tl.arange(0, K)
    key = tl.where(valid, ordered(total), DEAD).to(tl.int64)
    # descending by score, then by place: one ascending sort of both in one integer
    rank = tl.sort((-key << 32) + beam, 0)
    source = (rank & 0xFFFFFFFF).to(tl.int32)
    num_valid = tl.sum(valid.to(tl.int32), 0)
    returned = beam < num_valid
    row = out + request.to(tl.int64) * out_stride
    tl.store(row, num_valid)
    tl.store(row + 1, kept)
    index = tl.load(lows + first + source, mask=returned, other=-1)
    target = row + 2 + beam * (1 + L)
    tl.store(target, index)
    for level in tl.static_range(L):
        log_p = tl.load(history + (first + source) * L + level, mask=returned, other=0.0)
        tl.store(target + 1 + level, log_p.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["num_requests", "words"], do_not_specialize_on_alignment=["counts"])
def select_beams(
    log_probs, maxima, group_maxima, chosen, values,
    counts, scores, prefixes, lows, highs, history,
    new_counts, new_scores, new_prefixes, new_lows, new_highs, new_history, parents, codes,
    asked, positions, catalogues, out,
    num_requests, size, suffix, groups, rows, out_stride, words,
    K: tl.constexpr, L: tl.constexpr, LEVEL: tl.constexpr, IN_TABLE: tl.constexpr, FAN: tl.constexpr,
    BLOCK: tl.constexpr, ONE: tl.constexpr, ITEM_SCORES: tl.constexpr,
):  # fmt: skip
    """One program a request: from the candidates of level LEVEL (from 0) to its beams, or to the answer.

    Beams are rows [N · K] of counts [N], scores, prefixes, lows and highs (the keys below a prefix), history [N · K, L]
    (log p of each level so far); ``new_*`` are those of the children, with their parents and codes. asked int32
    [8, N], positions and catalogues are those of `Plan.search`.
    BLOCK values are looked at in one go; ONE says that there are never more. ``chosen`` int32 [4, rows] and ``values``
    float32 [N · K · FAN] are scratch.
    At the last level ``out`` int32 [N, 2 + K · (1 + L)] gets what `pack_answer` describes; or, with ITEM_SCORES, beams
    that are no items get an empty range of keys, and `rank_items` writes the answer.
    """
    request = tl.program_id(0)
    first = request.to(tl.int64) * K
    width = tl.minimum(tl.load(asked + request), K)
    row_size = groups * (FAN * FAN)
    keys, num_keys, ranks, table = catalogue_of(asked, num_requests, request, catalogues, words, LEVEL)
    log_probs += first * row_size
    values += first * FAN
    chosen += first

    kept = tl.load(counts + request)
    count = kept * groups
    floor = tl.full([], FINITE, tl.int32)
    # a loop, not three calls: half the machine code, all of which a program has to fetch once
    for stage in range(3):
        looked_at = values
        if stage == 0:
            looked_at = group_maxima + first * groups
        else:
            source = log_probs
            if stage == 1:
                source = maxima + first * groups * FAN
            gather(source, scores + first, chosen, count, values, row_size, stage, FAN, BLOCK)
        kept, floor = pick(looked_at, count, width, floor, chosen, chosen + rows, stage, FAN, BLOCK, ONE)
        chosen += rows
        count = kept * FAN
    tl.store(new_counts + request, kept)

    beam = tl.arange(0, K)
    alive = beam < kept
    candidate = tl.load(chosen + beam, mask=alive, other=0)
    parent = first + candidate // row_size
    code = candidate % row_size
    log_p = tl.load(log_probs + candidate, mask=alive, other=0.0)
    total = tl.load(scores + parent, mask=alive, other=float("-inf")) + log_p
    tl.store(parents + first + beam, candidate // row_size, mask=alive)
    tl.store(codes + first + beam, code, mask=alive)
    tl.store(new_scores + first + beam, total, mask=alive)
    tl.store(new_history + (first + beam) * L + LEVEL, log_p, mask=alive)
    child = tl.load(prefixes + parent, mask=alive, other=0) * size + code
    if LEVEL == 0:  # the root: no code yet, so every key is below it
        low, high = tl.zeros_like(beam), num_keys + tl.zeros_like(beam)
    else:
        low = tl.load(lows + parent, mask=alive, other=0)
        high = tl.load(highs + parent, mask=alive, other=0)
    low, high = child_range(keys, table, child, low, high, suffix, alive, IN_TABLE)
    tl.store(new_prefixes + first + beam, child, mask=alive)
    tl.store(new_lows + first + beam, low, mask=alive)
    tl.store(new_highs + first + beam, high, mask=alive)
    for level in tl.static_range(LEVEL):
        past = tl.load(history + parent * L + level, mask=alive, other=0.0)
        tl.store(new_history + (first + beam) * L + level, past, mask=alive)
    if LEVEL + 1 == L:
        tl.debug_barrier()
        rule, begin, end, ranks_at = rule_of(asked, num_requests, request)
        valid = alive & any_eligible(low, high, rule, positions, begin, end, ranks, ranks_at)
        if ITEM_SCORES:
            tl.store(new_highs + first + beam, low, mask=alive & (valid == 0))
        else:
            pack_answer(valid, total, kept, new_lows, new_history, request, out, out_stride, K, L)
