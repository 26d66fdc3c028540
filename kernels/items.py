"""What items themselves are worth: `ItemScores` of the beams behind the last level, and the answer by both.

Both kernels read what `select_beams` leaves with ITEM_SCORES: beams that are no items cover no keys.
"""

import triton
import triton.language as tl

from .select import pack_answer
from .validity import lower_bound

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["first", "shift"])
def item_products(
    hidden, embeddings, code_rows, keys, table, levels, counts, prefixes, lows, highs, history,
    weight, first, shift,
    K: tl.constexpr, L: tl.constexpr, H: tl.constexpr, BEAMS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program for BEAMS beams of a request: adds weight · (h_0 · vector) to their last log-probabilities.

    hidden [N, L + 1, H]; embeddings [V, H] and code_rows [Σ T_l, H], any float types. The item of keys[i] has row
    first + i; others have the sum of their codes' rows, ``levels`` int64 [L, 3]: row of code 0, keys below one code,
    codes. table[b] is the lower bound in ``keys`` of b << shift. history float32 [N · K, L]; the others are
    `select_beams`'s.
    """
    start_row = tl.program_id(0) * BEAMS
    request = start_row // K
    row = start_row + tl.arange(0, BEAMS)
    # rows of dead beams hold something, too: so all loads start at once
    low, high, key = tl.load(lows + row), tl.load(highs + row), tl.load(prefixes + row)
    last = history + row.to(tl.int64) * L + L - 1
    log_p = tl.load(last)
    valid = (row % K < tl.load(counts + request)) & (low < high)
    if tl.max(valid.to(tl.int32), 0) > 0:
        bucket = table + (key >> shift)
        end = tl.load(bucket + 1, mask=valid, other=0)
        at = lower_bound(keys, tl.load(bucket, mask=valid, other=0), end, key)
        inside = at < end
        known = inside & (tl.load(keys + at, mask=inside, other=0) == key)
        new = valid & (known == 0)
        summands = tl.max(new.to(tl.int32), 0) * L
        vectors = embeddings + (first + at).to(tl.int64)[:, None] * H
        states = hidden + request.to(tl.int64) * ((L + 1) * H)
        products = tl.zeros([BEAMS], tl.float32)
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            exists = column < H
            state = tl.load(states + column, mask=exists, other=0.0).to(tl.float32)
            vector = tl.load(vectors + column[None, :], mask=known[:, None] & exists[None, :], other=0.0).to(tl.float32)
            products += tl.sum(vector * state[None, :], 1)
            for level in range(summands):
                line = levels + level * 3
                code = key // tl.load(line + 1) % tl.load(line + 2)
                rows = code_rows + (tl.load(line) + code)[:, None] * H + column[None, :]
                vector = tl.load(rows, mask=new[:, None] & exists[None, :], other=0.0).to(tl.float32)
                products += tl.sum(vector * state[None, :], 1)
        tl.store(last, log_p + weight * products, mask=valid)


@triton.jit
def rank_items(counts, lows, highs, history, out, out_stride, K: tl.constexpr, L: tl.constexpr):
    """One program a request: the answer of `select_beams`, in the order of what ``history`` now sums up to."""
    request = tl.program_id(0)
    first = request.to(tl.int64) * K
    kept = tl.load(counts + request)
    beam = tl.arange(0, K)
    valid = (beam < kept) & (tl.load(lows + first + beam) < tl.load(highs + first + beam))
    total = tl.zeros([K], tl.float32)
    for level in tl.static_range(L):
        total += tl.load(history + (first + beam) * L + level)
    # where embeddings are no numbers: behind all other items, but before what is none
    total = tl.where(total > LOWEST, total, LOWEST)
    pack_answer(valid, total, kept, lows, history, request, out, out_stride, K, L)
