"""Which semantic IDs exist: binary search in the catalogue's sorted keys, or one look into a table of lower bounds."""

import triton
import triton.language as tl


@triton.jit
def lower_bound(keys, low, high, target):
    """First index of the ascending keys[low:high] whose key is at least ``target``; ``high`` if there is none.

    ``low``, ``high`` int32 and ``target`` int64 are blocks of one shape.
    """
    span = tl.max(high - low, 0)
    while span > 0:
        open_ = low < high
        middle = low + (high - low) // 2
        below = open_ & (tl.load(keys + middle, mask=open_, other=0) < target)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
        span = span // 2
    return low


@triton.jit
def catalogue_of(asked, num_requests, request, catalogues, words, level):
    """Keys, how many there are, ranks, and this level's table, of the catalogue that a request is searched in.

    ``catalogues`` int64 [catalogues, words] has addresses, see `triton_search.Plan.entry`: launches that were captured
    in a CUDA graph search in catalogues that come later.
    """
    line = catalogues + tl.load(asked + 7 * num_requests + request) * words
    keys = tl.load(line).to(tl.pointer_type(tl.int64))
    num_keys = tl.load(line + 1).to(tl.int32)
    ranks = tl.load(line + 2).to(tl.pointer_type(tl.int32))
    table = tl.load(line + 3 + level).to(tl.pointer_type(tl.int32))
    return keys, num_keys, ranks, table


@triton.jit
def rule_of(asked, num_requests, request):
    """A request's rule, where its positions begin and end, and its ranks, of the options [8, N] of `Plan.search`."""
    line = asked + 3 * num_requests + request
    rule, begin, end = tl.load(line), tl.load(line + num_requests), tl.load(line + 2 * num_requests)
    return rule, begin, end, tl.load(line + 3 * num_requests)


@triton.jit
def any_eligible(low, high, rule, positions, begin, end, ranks, ranks_at):
    """Whether some of the keys [low, high) may be taken under a request's rule.

    rule 0: all; 1: those at positions[begin:end] alone; 2: all but those. ``positions`` int32, ascending.
    With ranks_at >= 0, rule 2 starts from the keys of a combination of segments instead of all, those at the positions
    among them: ranks[ranks_at + m] is how many of the first m keys it has.
    """
    found = low < high
    if rule != 0:
        taken = high - low
        if ranks_at >= 0:
            taken = tl.load(ranks + ranks_at + high) - tl.load(ranks + ranks_at + low)
        first = begin + tl.zeros_like(low)
        last = end + tl.zeros_like(low)
        listed = lower_bound(positions, first, last, high) - lower_bound(positions, first, last, low)
        found = tl.where(rule == 1, listed > 0, listed < taken)
    return found


@triton.jit
def has_child(
    keys, table, prefix, low, high, codes, size, suffix, rule, positions, begin, end, ranks, ranks_at,
    IN_TABLE: tl.constexpr,
):  # fmt: skip
    """Whether each of a prefix's ``codes`` leads to a key, and to one that the request's rule allows.

    ``prefix`` (int64 scalar) covers keys[low:high]; ``size`` is T of the level, ``suffix`` the keys below one child.
    With ``IN_TABLE``, table[p] is the lower bound of child prefix p of this level.
    """
    child = prefix * size + codes
    if IN_TABLE:
        first = tl.load(table + child)
        behind = tl.load(table + child + 1)
    else:
        first = lower_bound(keys, low + tl.zeros_like(codes), high + tl.zeros_like(codes), child * suffix)
        inside = first < high
        one = inside & (tl.load(keys + first, mask=inside, other=0) < (child + 1) * suffix)
        behind = first + one.to(tl.int32)
        if rule != 0:
            behind = lower_bound(keys, first, high + tl.zeros_like(codes), (child + 1) * suffix)
    return first < behind, any_eligible(first, behind, rule, positions, begin, end, ranks, ranks_at)


@triton.jit
def child_range(keys, table, child, low, high, suffix, alive, IN_TABLE: tl.constexpr):
    """Keys [low, high) below each child prefix (int64 block) whose parent covers keys[low:high]."""
    if IN_TABLE:
        new_low = tl.load(table + child, mask=alive, other=0)
        new_high = tl.load(table + child + 1, mask=alive, other=0)
    else:
        low = tl.where(alive, low, 0)
        high = tl.where(alive, high, 0)
        new_low = lower_bound(keys, low, high, child * suffix)
        new_high = lower_bound(keys, new_low, high, (child + 1) * suffix)
    return new_low, new_high
