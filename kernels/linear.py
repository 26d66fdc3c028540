"""The draft head's matrix products, float32 sums: all that depends on the request alone, and one level's beams."""

import triton
import triton.language as tl


@triton.jit
def tile_of(tiles):
    """The program's line of ``tiles``, see `request_products`."""
    line = tiles + tl.program_id(0) * 5
    row = tl.load(line).to(tl.int64)
    return row, tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)


@triton.jit(do_not_specialize=["num_requests"])
def request_products(
    hidden, weights, tiles, out,
    num_requests, out_stride,
    S: tl.constexpr, H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_1 (h_0 + h_1), W_hh,1 h_0 and W_l h_l for l ≥ 2, in one launch over the rows of all of them.

    hidden [N, S, H]; weights [rows, H]; tiles int32 [programs, 5], one line a block of rows of ``weights``: first row,
    how many, the state to multiply with, the state to add to it or -1, first column of ``out``; out float32 [N, …].
    """
    row, num_rows, first, second, column = tile_of(tiles)
    request = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = request < num_requests
    offset = tl.arange(0, BLOCK_C)
    inner = tl.arange(0, BLOCK_H)
    states = hidden + tl.minimum(request, num_requests - 1).to(tl.int64)[:, None] * (S * H) + inner[None, :]
    rows = weights + (row + tl.minimum(offset, num_rows - 1))[None, :] * H + inner[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, H, BLOCK_H):
        state = tl.load(states + first * H + start)
        other = tl.load(states + second * H + start, mask=second >= 0, other=0.0)
        state = (state.to(tl.float32) + other.to(tl.float32)).to(weights.dtype.element_ty)
        sums = tl.dot(state, tl.load(rows + start), sums, input_precision=PRECISION)
    target = out + request.to(tl.int64)[:, None] * out_stride + column + offset[None, :]
    tl.store(target, sums, mask=exists[:, None] & (offset < num_rows)[None, :])


@triton.jit(do_not_specialize=["num_requests"])
def few_request_products(
    hidden, weights, tiles, out,
    num_requests, out_stride,
    S: tl.constexpr, H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`request_products` for a handful of requests: rows of weights are read once, whole, and kept in registers.

    tiles as there, with at most BLOCK_C rows a line; BLOCK_H is the power of two from H on.
    """
    row, num_rows, first, second, column = tile_of(tiles)
    offset = tl.arange(0, BLOCK_C)
    inner = tl.arange(0, BLOCK_H)
    inside = inner < H
    rows = weights + (row + offset)[:, None] * H + inner[None, :]
    weight = tl.load(rows, mask=(offset < num_rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    for request in range(num_requests):
        states = hidden + request * (S * H) + inner
        state = tl.load(states + first * H, mask=inside, other=0.0).to(tl.float32)
        state += tl.load(states + second * H, mask=inside & (second >= 0), other=0.0).to(tl.float32)
        state = state.to(weights.dtype.element_ty).to(tl.float32)
        sums = tl.sum(weight * state[None, :], 1)
        tl.store(out + request * out_stride + column + offset, sums, mask=offset < num_rows)


@triton.jit
def beam_products(
    states, weights, logits, drives, counts,
    num_rows, num_codes, logit_stride,
    K: tl.constexpr, H: tl.constexpr, WITH_DRIVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_l s and, with ``WITH_DRIVES``, W_hh,l s for the beams' states s [N · K, H].

    ``states`` and ``weights`` are tensor descriptors with blocks [BLOCK_M, BLOCK_H] and [BLOCK_C, BLOCK_H]; weights
    [T + H, H] holds W_l and below it W_hh,l; logits float32 [N · K, logit_stride]; drives [N · K, H].
    Blocks of beams that are all dead are skipped.
    """
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    logit_blocks = tl.cdiv(num_codes, BLOCK_C)
    all_blocks = logit_blocks
    if WITH_DRIVES:
        all_blocks += tl.cdiv(H, BLOCK_C)
    # programs go through GROUP blocks of beams at a time, so that states and weights are found in L2
    program = tl.program_id(0)
    group = program // (GROUP * all_blocks)
    group_size = tl.minimum(num_blocks - group * GROUP, GROUP)
    block = group * GROUP + program % (GROUP * all_blocks) % group_size
    part = program % (GROUP * all_blocks) // group_size

    start_row = block * BLOCK_M
    beam = start_row % K
    one_request = beam + BLOCK_M <= K
    if (one_request == 0) | (beam < tl.load(counts + start_row // K)):
        is_logits = part < logit_blocks
        column = tl.where(is_logits, part, part - logit_blocks) * BLOCK_C
        first_row = tl.where(is_logits, 0, num_codes) + column
        sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start in range(0, H, BLOCK_H):
            weight = weights.load([first_row, start])
            sums = tl.dot(states.load([start_row, start]), weight.T, sums, input_precision=PRECISION)
        row = start_row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_C)
        inside = (row < num_rows)[:, None] & (columns < tl.where(is_logits, num_codes, H))[None, :]
        if is_logits:
            tl.store(logits + row.to(tl.int64)[:, None] * logit_stride + columns[None, :], sums, mask=inside)
        else:
            target = drives + row.to(tl.int64)[:, None] * H + columns[None, :]
            tl.store(target, sums.to(drives.dtype.element_ty), mask=inside)


@triton.jit
def context_states(
    code_drives, drives, codes, parents, counts, states,
    request_stride, parent_stride,
    K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """s_{l+1} = tanh(G_l[code] + W_hh s_l[parent]) for the beams kept, [N · K, H]."""
    row = tl.program_id(0)
    request = row // K
    if row % K < tl.load(counts + request):
        code = tl.load(codes + row).to(tl.int64)
        parent = tl.load(parents + row).to(tl.int64)
        source = drives + request.to(tl.int64) * request_stride + parent * parent_stride
        target = states + row.to(tl.int64) * H
        for start in range(0, H, BLOCK_H):
            at = start + tl.arange(0, BLOCK_H)
            inside = at < H
            drive = tl.load(code_drives + code * H + at, mask=inside, other=0.0).to(tl.float32)
            drive += tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            decay = tl.exp(-2 * tl.abs(drive))
            size = (1 - decay) / (1 + decay)
            tl.store(target + at, tl.where(drive < 0, -size, size).to(states.dtype.element_ty), mask=inside)
