"""Exact top-k by counting: no sort until the end, and equal values go to the lowest position.

Floats are compared as integers of the same order. `threshold` finds the k-th largest of a row by cutting an interval of
integers and counting; whoever lies above it is kept, and of those equal to it the first ones by position.
"""

import triton
import triton.language as tl

DEAD = tl.constexpr(-2139095041)  # `ordered` of minus infinity
FINITE = tl.constexpr(-2139095040)  # and of the smallest number above it
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(values):
    """float32 → int32 of the same order. Add 0.0 to ``values`` first where -0.0 may occur."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ordered_at(values, start, count, BLOCK: tl.constexpr):
    """`ordered` of values[start : start + BLOCK], minus infinity from ``count`` on."""
    at = start + tl.arange(0, BLOCK)
    return ordered(tl.load(values + at, mask=at < count, other=float("-inf")))


@triton.jit
def _combine(top0, bottom0, alive0, top1, bottom1, alive1):
    return tl.maximum(top0, top1), tl.minimum(bottom0, bottom1), alive0 + alive1


@triton.jit
def extremes(keys, floor):
    """Largest and smallest of a block's keys from ``floor`` on, and how many they are."""
    alive = keys >= floor
    return tl.reduce((keys, tl.where(alive, keys, LARGEST), alive.to(tl.int32)), 0, _combine)


@triton.jit
def count_from(values, count, bound, first, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """How many of values[:count] are at least ``bound``; ``first`` is their first block, or all there is."""
    total = tl.sum((first >= bound).to(tl.int32), 0)
    if not ONE_BLOCK:
        for start in range(BLOCK, count, BLOCK):
            total += tl.sum((ordered_at(values, start, count, BLOCK) >= bound).to(tl.int32), 0)
    return total


@triton.jit
def threshold(values, count, wanted, floor, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """What to keep of values[:count] for the ``wanted`` ≥ 1 largest finite ones.

    ``floor`` is at most what `ordered` makes of the last of them: `FINITE` where nothing better is known.
    Returns ``bound`` (int32: keep what `ordered` puts above it), ``ties`` (and so many of those equal to it) and
    ``kept`` = min(wanted, finite values).
    """
    first = ordered_at(values, 0, count, BLOCK)
    top, bottom, alive = extremes(first, floor)
    if not ONE_BLOCK:
        for start in range(BLOCK, count, BLOCK):
            top1, bottom1, alive1 = extremes(ordered_at(values, start, count, BLOCK), floor)
            top, bottom, alive = _combine(top, bottom, alive, top1, bottom1, alive1)
    # invariant: at_low values are at least low, and they are enough; at_high are at least low + span, and they are not
    low, at_low, at_high = bottom, alive, tl.full([], 0, tl.int32)
    span = (top + 1 - low).to(tl.uint32, bitcast=True)
    counts = tl.full([], 0, tl.int32)
    while (at_low > wanted) & (span > 1):
        # One count a step, little else: three bounds or a histogram a step cost more than the steps they save. Where
        # the bound would lie if keys were spread evenly, but an eighth towards the middle, so that both ends move; in
        # the middle once ten counts have not found it, so that 42 are the most there can be.
        share = 0.0625 + 0.875 * (at_low - wanted).to(tl.float32) / (at_low - at_high).to(tl.float32)
        step = tl.minimum(tl.maximum((share * span.to(tl.float32)).to(tl.uint32), 1), span - 1)
        step = tl.where(counts < 10, step, span >> 1)
        counts += 1
        middle = low + step.to(tl.int32, bitcast=True)
        found = count_from(values, count, middle, first, BLOCK, ONE_BLOCK)
        enough = found >= wanted
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, found, at_low)
        at_high = tl.where(enough, at_high, found)
        span = tl.where(enough, span - step, step)
    tied = at_low > wanted  # then span = 1
    return tl.where(tied, low, low - 1), tl.where(tied, wanted - at_high, 0), tl.minimum(wanted, alive)


@triton.jit
def places(keys, bound, ties, above_before, tied_before, ONE_BLOCK: tl.constexpr):
    """Whether each of a block's keys is kept and its place among the kept, given the counts before the block.

    Returns also the counts behind it. Counts stay below 2^15 and 2^16, so one scan carries both.
    """
    above = (keys > bound).to(tl.int32)
    tied = (keys == bound).to(tl.int32)
    packed = above * 65536 + tied
    before = tl.cumsum(packed, 0) - packed
    num_above = above_before + (before >> 16)
    num_tied = tied_before + (before & 0xFFFF)
    kept = (above > 0) | ((tied > 0) & (num_tied < ties))
    place = num_above + tl.minimum(num_tied, ties)
    if not ONE_BLOCK:
        above_before += tl.sum(above, 0)
        tied_before += tl.sum(tied, 0)
    return kept, place, above_before, tied_before
