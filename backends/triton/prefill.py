"""Attention of sequences with many new tokens: each CTA takes a tile of query rows and walks all keys they see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .call import form_of, numbers_of, taking
from .launch import Launch, Launcher
from .quantised import narrow
from .sizes import power_of_two, prefill_sizes
from .tile import add_sink, at_head, block_ids, load_rows, no_sums, normalise, store_nothing, store_rows, walk


@triton.jit
def _find(tile, query_start, num_seqs, TOKENS: tl.constexpr):
    """The sequence that a tile of tokens belongs to; ``num_seqs`` if it is past all of them.

    Sequence ``i`` owns the tiles from ``query_start[i] // TOKENS + i`` on: one more than it may need, so that the
    number of tiles depends on the number of tokens and sequences alone.
    """
    low, high = 0, num_seqs  # the last sequence that begins at this tile or before
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _attend(
    query, key, value, key_scale, value_scale, blocks, out, lse, slopes, sinks, scale, softcap, window,
    token, offset, new, length, head, group, heads,
    stride_query_token, stride_query_head, stride_block, stride_kv_head, stride_token, stride_scale,
    stride_scale_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """TOKENS queries, from ``offset`` on, of a sequence whose ``new`` begin at ``token``; all of one K/V head."""
    row = tl.arange(0, ROWS)
    ours = tl.minimum(new - offset, TOKENS)
    position = length - new + offset + row // group
    rows = load_rows(query + head * group * stride_query_head, token + offset, ours, group,
                     stride_query_token, stride_query_head, scale, ROWS, DIM, PADDED_DIM)  # fmt: skip
    power = None
    if key_scale is not None:
        rows, power = narrow(rows)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head * group + row % group)
    key, value = at_head(key, head, stride_kv_head), at_head(value, head, stride_kv_head)
    key_scale = at_head(key_scale, head, stride_scale_head)
    value_scale = at_head(value_scale, head, stride_scale_head)
    acc, top, total = no_sums(ROWS, PADDED_DIM)

    earliest = length - new + offset  # the position of the first row
    stop = tl.minimum(length, earliest + ours) if CAUSAL else length
    first = 0
    begin = 0
    if window is not None:
        first = tl.maximum(earliest + 1 - window, 0)
        begin = first // TILE * TILE
    else:
        full = tl.maximum(tl.minimum(length, earliest + 1), 0) if CAUSAL else length
        begin = full // TILE * TILE  # every row sees all before
        block = block_ids(blocks, 0, stop, BLOCK_SIZE, TILE)
        acc, top, total = walk(
            rows, power, block, acc, top, total, key, value, key_scale, value_scale, blocks, 0, begin, first, stop,
            position, slope, scale, softcap, window, stride_block, stride_token, stride_scale,
            BLOCK_SIZE, DIM, TILE, CAUSAL, False,
        )  # fmt: skip
    block = block_ids(blocks, begin, stop, BLOCK_SIZE, TILE)
    acc, top, total = walk(
        rows, power, block, acc, top, total, key, value, key_scale, value_scale, blocks, begin, stop, first, stop,
        position, slope, scale, softcap, window, stride_block, stride_token, stride_scale,
        BLOCK_SIZE, DIM, TILE, CAUSAL, True,
    )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head * group + row % group)
        acc, top, total = add_sink(acc, top, total, sink)
    values, bits = normalise(acc, top, total)
    store_rows(out, lse, values, bits, token + offset, ours, head * group, group, heads,
               ROWS, DIM, PADDED_DIM)  # fmt: skip


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "window", "least_new", "stride_table"],
            do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start", "lse", "slopes", "sinks",
                                            "key_scale", "value_scale"],
            )  # fmt: skip
def prefill_kernel(
    query, out, key, value, lse, key_scale, value_scale, block_table,
    seq_lens, query_start, slopes, sinks, scale, softcap, window,
    num_seqs, num_tokens, kv_heads, group, least_new,
    stride_query_token, stride_query_head, stride_block, stride_kv_head, stride_token, stride_scale,
    stride_scale_head, stride_table,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """TOKENS new tokens under the query heads of one K/V head; sequences of fewer than ``least_new`` are skipped.

    query       [tokens, heads, DIM] by strides      out         [tokens, heads, DIM]
    key, value  [blocks, kv_heads, BLOCK_SIZE, DIM] by strides   lse         [tokens, heads] or None
    key_scale, value_scale  [blocks, kv_heads, BLOCK_SIZE] by strides, or None
    block_table [seqs, width] by stride_table        slopes, sinks  [heads] or None
    seq_lens    [seqs]                               query_start [seqs + 1]
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks begin first
    head = tl.program_id(1)
    heads = kv_heads * group
    seq = _find(tile, query_start, num_seqs, TOKENS)
    token = tl.load(query_start + seq)
    offset = (tile - token // TOKENS - seq) * TOKENS
    if seq == num_seqs:
        for i in range(group):
            store_nothing(out, lse, token + offset, num_tokens, head * group + i, heads, TOKENS, DIM, PADDED_DIM)
    else:
        new = tl.load(query_start + seq + 1) - token
        if (offset < new) & (new >= least_new):
            _attend(
                query, key, value, key_scale, value_scale, block_table + seq.to(tl.int64) * stride_table,
                out, lse, slopes, sinks,
                scale, softcap, window, token, offset, new, tl.load(seq_lens + seq), head, group, heads,
                stride_query_token, stride_query_head, stride_block, stride_kv_head, stride_token, stride_scale,
                stride_scale_head,
                BLOCK_SIZE, DIM, PADDED_DIM, ROWS, TOKENS, TILE, CAUSAL,
            )  # fmt: skip


_prefill = Launcher(prefill_kernel)
_prefill_takes = taking("query", "out", "key", "value", "lse", "key_scale", "value_scale", "block_table")


def prefill(
    query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams, with_lse: bool, least_new: int
) -> Launch:
    """What attends the sequences of ``least_new`` new tokens or more, and fills the rows past the batch.

    Arguments as in ``Backend.attention``, checked. Returns a launch over ``Tensors``.
    """
    num_tokens, heads, dim = query.shape
    _, kv_heads, block_size, _ = kv.key.shape
    padded_dim, group = power_of_two(dim), heads // kv_heads
    sizes = prefill_sizes(query.dtype, padded_dim, quantised=kv.key_scale is not None)
    tokens = 1 << ((sizes.rows // group).bit_length() - 1)
    key, strides = form_of(query, kv, params, with_lse, sizes, params.causal)
    return Launch(
        _prefill, (num_tokens // tokens + batch.num_seqs + 1, kv_heads, 1), key, _prefill_takes,
        (
            batch.seq_lens, batch.query_start, params.alibi_slopes, params.sinks,
            *numbers_of(params, dim), batch.num_seqs, num_tokens, kv_heads, group, least_new, *strides,
            batch.block_table.stride(0), block_size, dim, padded_dim, sizes.rows, tokens, sizes.tile, params.causal,
        ),
        {"num_warps": sizes.warps, "num_stages": sizes.stages},
    )  # fmt: skip
