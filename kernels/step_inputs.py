"""Everything a prefill reads of its batch, written to its place by one launch.

The host packs a *plan*, one int32 array in pinned memory, and the kernel reads it there; a copy to the device first
would be a second launch and save nothing. Words of a plan for N requests:

* N rows of ``PLAN_FIELDS``: position of the request's first token in the batch, tokens to compute, tokens already in
  the KV cache, word at which its block ids begin, how many there are;
* the token ids of the batch, from word ``PLAN_FIELDS · N`` on;
* block ids, where the rows say.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

PLAN_FIELDS = 5
PAD_SLOT = -1
BLOCK = 1024


class StepInputs(NamedTuple):
    """Tensors on the device that a captured prefill reads. R requests and T tokens at most, W blocks a request."""

    input_ids_T: Tensor  # int32
    positions_T: Tensor  # int64
    query_start_R1: Tensor  # int32, R + 1
    seq_lens_R: Tensor  # int32
    block_table_RW: Tensor  # int32, contiguous
    slot_mapping_T: Tensor  # int64


def fill_step_inputs(
    plan: Tensor,
    inputs: StepInputs,
    *,
    num_requests: int,
    num_tokens: int,
    padded_requests: int,
    padded_tokens: int,
    block_size: int,
) -> None:
    """Write the batch of a plan, and padding behind it: requests without tokens, tokens without a cache slot.

    Nothing waits: ``plan`` must stay as it is until the launch has run.
    """
    _fill_step_inputs[(padded_requests + 1,)](
        plan,
        *inputs,
        num_requests,
        num_tokens,
        padded_requests,
        padded_tokens,
        inputs.block_table_RW.shape[1],
        block_size,
        FIELDS=PLAN_FIELDS,
        PAD=PAD_SLOT,
        BLOCK=BLOCK,
    )


# one variant whatever the numbers are: a compilation in the middle of serving would cost a request a second
@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "padded_requests", "padded_tokens", "table_width", "block_size"]
)
def _fill_step_inputs(
    plan,
    input_ids,
    positions,
    query_start,
    seq_lens,
    block_table,
    slot_mapping,
    num_requests,
    num_tokens,
    padded_requests,
    padded_tokens,
    table_width,
    block_size,
    FIELDS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)

    if row == padded_requests:
        tl.store(query_start, 0)
        for first in range(num_tokens, padded_tokens, BLOCK):
            token = first + lane
            inside = token < padded_tokens
            tl.store(input_ids + token, 0, mask=inside)
            tl.store(positions + token, 0, mask=inside)
            tl.store(slot_mapping + token, PAD, mask=inside)
        return

    blocks = block_table + row.to(tl.int64) * table_width
    if row >= num_requests:
        tl.store(query_start + row + 1, num_tokens)
        tl.store(seq_lens + row, 0)
        for first in range(0, table_width, BLOCK):
            tl.store(blocks + first + lane, 0, mask=first + lane < table_width)
        return

    fields = plan + row * FIELDS
    start = tl.load(fields)
    length = tl.load(fields + 1)
    computed = tl.load(fields + 2)
    block_ids = plan + tl.load(fields + 3)
    num_blocks = tl.load(fields + 4)
    tl.store(query_start + row + 1, start + length)
    tl.store(seq_lens + row, computed + length)
    for first in range(0, num_blocks, BLOCK):
        inside = first + lane < num_blocks
        tl.store(blocks + first + lane, tl.load(block_ids + first + lane, mask=inside), mask=inside)

    token_ids = plan + num_requests * FIELDS + start
    for first in range(0, length, BLOCK):
        token = first + lane
        inside = token < length
        position = computed + token
        block = tl.load(block_ids + position // block_size, mask=inside, other=0).to(tl.int64)
        tl.store(input_ids + start + token, tl.load(token_ids + token, mask=inside), mask=inside)
        tl.store(positions + start + token, position.to(tl.int64), mask=inside)
        tl.store(slot_mapping + start + token, block * block_size + position % block_size, mask=inside)
