"""Quantised keys and values widened once, where many tiles of queries would each do it again.

Keys and values of a batch go into memory of the call, scaled and rounded to the type of the queries, as blocks of their
own with a table of their own; what attends to them needs not know that the pool is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagemgr.backends.interface import KVLayer
from pagemgr.batch import PagedBatch

from .call import Tensors
from .launch import Launch, Launcher, launch_all, scale_strides
from .sizes import power_of_two
from .tile import block_ids, load_tile, token_offsets

BLOCK = 64
"""Tokens of a widened block; what a CTA widens."""
MOST_BYTES = 1 << 28
"""Of widened keys and values; beyond, every tile of queries widens for itself."""
LEAST_TILES = 4
"""Tiles of queries under one K/V head from which on writing and reading again takes less than widening again."""


@triton.jit(do_not_specialize=["window", "stride_table", "width"],
            do_not_specialize_on_alignment=["key_scale", "value_scale", "block_table", "seq_lens", "query_start"],
            )  # fmt: skip
def widen_kernel(
    key, value, wide_key, wide_value, key_scale, value_scale, block_table, wide_table,
    seq_lens, query_start, window, kv_heads, stride_block, stride_head, stride_token, stride_scale, stride_scale_head,
    stride_table, width,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one sequence under one K/V head.

    key, value              [blocks, kv_heads, BLOCK_SIZE, DIM] by strides    block_table  [seqs, any] by stride_table
    key_scale, value_scale  [blocks, kv_heads, BLOCK_SIZE] by strides         seq_lens     [seqs]
    wide_key, wide_value    [seqs * width, kv_heads, BLOCK, DIM]              query_start  [seqs + 1]
    wide_table              [seqs, width]
    """
    index, head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, length, first = index * BLOCK, tl.load(seq_lens + seq), 0
    if window is not None:
        new = tl.load(query_start + seq + 1) - tl.load(query_start + seq)
        first = length - new + 1 - window  # before, nothing is seen
    if (start < length) & (start + BLOCK > first):
        held = start + tl.arange(0, BLOCK) < length
        dim = tl.arange(0, PADDED_DIM)
        block = block_ids(block_table + seq * stride_table, start, length, BLOCK_SIZE, BLOCK)
        where = token_offsets(block, start, stride_block, stride_token, BLOCK_SIZE, BLOCK)
        scale_where = block.to(tl.int64) * stride_scale + (start + tl.arange(0, BLOCK)) % BLOCK_SIZE
        number = seq * width + index
        if head == 0:
            tl.store(wide_table + number, number.to(tl.int32))
        target = ((number * kv_heads + head) * BLOCK + tl.arange(0, BLOCK))[:, None] * DIM + dim[None, :]
        inside = held[:, None] & (dim < DIM)[None, :]
        for of in tl.static_range(2):
            source, scale, wide = (key, key_scale, wide_key) if of == 0 else (value, value_scale, wide_value)
            rows = load_tile((source + head * stride_head + dim)[None, :] + where, held, dim < DIM, DIM, True)
            scales = tl.load(scale + head * stride_scale_head + scale_where, mask=held, other=0.0)
            rows = rows.to(tl.float32) * scales[:, None]
            tl.store(wide + target, rows.to(wide.dtype.element_ty), mask=inside)


_widen = Launcher(widen_kernel)


@dataclass(frozen=True, slots=True)
class Widening:
    """What widens, and the shape of what it makes."""

    launch: Launch
    kv: KVLayer
    """Widened keys and values, without memory."""
    table: torch.Tensor
    """The table of their blocks, without memory."""

    def __call__(self, tensors: Tensors) -> Tensors:
        """Launch; the same call with widened keys and values in memory that is taken anew."""
        device = tensors.query.device
        key, value, table = (torch.empty_like(x, device=device) for x in (self.kv.key, self.kv.value, self.table))
        pool = (tensors.key_scale, tensors.value_scale, tensors.block_table)
        launch_all([self.launch], (tensors.key, tensors.value, key, value, *pool, table), device)
        return tensors._replace(key=key, value=value, key_scale=None, value_scale=None, block_table=table)


def widening(
    query: torch.Tensor, kv: KVLayer, batch: PagedBatch, window: int | None, query_tiles: int
) -> Widening | None:
    """For tensors of these shapes, strides and types, of which a K/V head has ``query_tiles`` tiles of queries.

    None if it would not pay: for few tiles, for float32, whose products take longest, and where memory is short.
    """
    _, kv_heads, block_size, dim = kv.key.shape
    width = -(-max(batch.max_seq_len, 1) // BLOCK)
    shape = (batch.num_seqs * width, kv_heads, BLOCK, dim)
    key, value = (torch.empty(shape, dtype=query.dtype, device="meta") for _ in range(2))
    if kv.key_scale is None or query.dtype is torch.float32:
        return None
    if query_tiles < LEAST_TILES or key.nbytes + value.nbytes > MOST_BYTES:
        return None
    strides = (*kv.key.stride()[:3], *scale_strides(kv))
    launch = Launch(
        _widen,
        (width, kv_heads, batch.num_seqs),
        (query.device, query.dtype, kv.key.dtype, kv_heads, strides, block_size, dim, window is None),
        tuple,
        (
            batch.seq_lens, batch.query_start, window, kv_heads, *strides, batch.block_table.stride(0), width,
            block_size, dim, power_of_two(dim), BLOCK,
        ),
        {"num_warps": 4},
    )  # fmt: skip
    return Widening(launch, KVLayer(key, value), torch.empty(batch.num_seqs, width, dtype=torch.int32, device="meta"))
