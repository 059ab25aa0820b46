"""Attention of sequences with few new tokens: the keys of the whole batch are cut into equal shares, one a CTA.

The batch is one line of tiles: sequence by sequence, in each K/V head by K/V head, in each tile by tile of its keys. A
(sequence, head) is an item. CTA ``c`` of ``C`` takes tiles ``[c N / C, (c + 1) N / C)`` of the line, whatever the
lengths are, so that a ragged batch has no tail; it reads the lengths itself, so that nothing is planned on the host and
a captured launch serves any lengths. An item that lies in one share is stored at once. Of a cut item every share stores
a part, and a second kernel joins the parts.

    line   |  seq 0 head 0  |  seq 0 head 1  | seq 1 head 0 | seq 1 head 1 | ...
    share  |    c = 0    |    c = 1    |    c = 2    |    c = 3    | ...          part 2c: the share's first item,
                                                                                  part 2c + 1: its last, if another
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .call import Tensors, form_of, numbers_of, taking
from .device import chains, multiprocessors
from .launch import Launch, Launcher
from .quantised import narrow
from .sizes import DecodeSizes, decode_sizes, power_of_two
from .tile import add_sink, at_head, block_ids, load_rows, no_sums, normalise, store_nothing, store_rows, walk

JOINED = tl.constexpr(16)
"""Parts joined in one go."""


@triton.jit
def _sequence(seq, num_seqs, seq_lens, query_start, window, most_new, TILE: tl.constexpr):
    """Of these sequences: tiles of one item, tokens, first query, queries.

    At least 1 tile if there is a query; none if it is not for us, or past the last sequence.
    """
    inside = seq < num_seqs
    token = tl.load(query_start + seq, mask=inside, other=0)
    new = tl.load(query_start + seq + 1, mask=inside, other=0) - token
    length = tl.load(seq_lens + seq, mask=inside, other=0)
    count = tl.maximum((length + TILE - 1) // TILE - _first_key(length, new, window) // TILE, 1)
    return tl.where((new > 0) & (new <= most_new), count, 0), length, token, new


@triton.jit
def _first_key(length, new, window):
    """The first position that the first new token sees."""
    if window is None:
        return length * 0
    else:
        return tl.maximum(length - new + 1 - window, 0)


@triton.jit
def _views(scratch, ctas, ROWS: tl.constexpr, PADDED_DIM: tl.constexpr):
    """What the scratch memory holds.

    parts  float32 [2 * ctas, ROWS, PADDED_DIM], and their log denominators in bits, float32 [2 * ctas, ROWS]
    cuts   int32 [seqs, kv_heads, 2]: an item's first part, and in how many shares it lies, 0 if in one
    """
    part_lse = scratch + ctas * 2 * ROWS * PADDED_DIM
    return scratch, part_lse, (part_lse + ctas * 2 * ROWS).to(tl.pointer_type(tl.int32))


@triton.jit
def _share_start(cta, tiles, ctas):
    """The first tile of a share."""
    return cta * (tiles // ctas) + tl.minimum(cta, tiles % ctas)


@triton.jit
def _share_of(tile, tiles, ctas):
    """The share that a tile is in."""
    small, longer = tiles // ctas, tiles % ctas
    boundary = longer * (small + 1)
    behind = longer + (tile - boundary) // tl.maximum(small, 1)
    return tl.where(tile < boundary, tile // (small + 1), behind)


@triton.jit
def _tiles(seqs, num_seqs, seq_lens, query_start, window, most_new, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """Of these sequences: tiles of one head."""
    count, _, _, new = _sequence(seqs, num_seqs, seq_lens, query_start, window, most_new, TILE)
    return count * ((new + TOKENS - 1) // TOKENS)


@triton.jit
def _locate(cta, ctas, num_seqs, kv_heads, seq_lens, query_start, window, most_new,
            TILE: tl.constexpr, TOKENS: tl.constexpr, SEQS: tl.constexpr):  # fmt: skip
    """Tiles in the line; where this share begins and ends; the sequence it begins in, and one head's tiles before that.

    SEQS lengths are looked at in one go.
    """
    tiles = 0
    for base in range(0, num_seqs, SEQS):
        seqs = base + tl.arange(0, SEQS)
        tiles += tl.sum(_tiles(seqs, num_seqs, seq_lens, query_start, window, most_new, TILE, TOKENS))
    tiles *= kv_heads
    begin, end = _share_start(cta, tiles, ctas), _share_start(cta + 1, tiles, ctas)

    seq, before, seen = 0, 0, 0
    for base in range(0, num_seqs, SEQS):
        seqs = base + tl.arange(0, SEQS)
        counts = _tiles(seqs, num_seqs, seq_lens, query_start, window, most_new, TILE, TOKENS)
        ends = seen + tl.cumsum(counts, 0)
        passed = (ends <= begin // kv_heads) & (seqs < num_seqs)
        seq += tl.sum(passed.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0)))
        seen += tl.sum(counts)
    return tiles, begin, end, seq, before


@triton.jit
def _store(out, lse, acc, top, total, sinks, scratch, part, ctas, whole, token, new, head, group, heads,
           ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):  # fmt: skip
    """Store a whole item where it belongs, a part of one in the scratch memory."""
    row = tl.arange(0, ROWS)
    if whole:
        if sinks is not None:
            acc, top, total = add_sink(acc, top, total, tl.load(sinks + head * group + row % group))
        values, bits = normalise(acc, top, total)
        store_rows(out, lse, values, bits, token, new, head * group, group, heads, ROWS, DIM, PADDED_DIM)
    else:
        part_out, part_lse, _ = _views(scratch, ctas, ROWS, PADDED_DIM)
        values, bits = normalise(acc, top, total)
        where = part.to(tl.int64) * ROWS + row
        used = row < new * group
        tl.store(part_out + where[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None, :], values, mask=used[:, None])
        tl.store(part_lse + where, bits, mask=used)


@triton.jit
def _item(seq, head, offset, kv_heads, most_new, TOKENS: tl.constexpr):
    """The number of the item that the token ``offset`` of a sequence is in."""
    return (seq * kv_heads + head) * ((most_new + TOKENS - 1) // TOKENS) + offset // TOKENS


@triton.jit
def _attend(
    query, key, value, key_scale, value_scale, blocks, slopes, scale, softcap, window,
    token, offset, new, length, begin, end, head, group, stride_query_token, stride_query_head,
    stride_block, stride_kv_head, stride_token, stride_scale, stride_scale_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The sums of TOKENS queries, from ``offset`` on, over tiles ``[begin, end)`` of the keys of their sequence."""
    row = tl.arange(0, ROWS)
    first = _first_key(length, new, window)
    start, stop = (first // TILE + begin) * TILE, (first // TILE + end) * TILE
    block = block_ids(blocks, start, length, BLOCK_SIZE, TILE)
    rows = load_rows(query + head * group * stride_query_head, token + offset, tl.minimum(new - offset, TOKENS), group,
                     stride_query_token, stride_query_head, scale, ROWS, DIM, PADDED_DIM)  # fmt: skip
    power = None
    if key_scale is not None:
        rows, power = narrow(rows)
    slope = tl.load(slopes + head * group + row % group) if slopes is not None else None
    position = length - new + offset + row // group
    key, value = at_head(key, head, stride_kv_head), at_head(value, head, stride_kv_head)
    key_scale = at_head(key_scale, head, stride_scale_head)
    value_scale = at_head(value_scale, head, stride_scale_head)
    acc, top, total = no_sums(ROWS, PADDED_DIM)
    if ROWS > 64 and window is None:  # where masking takes time, not where reading does
        seen = length - new + offset + 1 if CAUSAL else length
        full = tl.minimum(tl.maximum(seen // TILE * TILE, start), stop)  # every row sees all before
        acc, top, total = walk(
            rows, power, block, acc, top, total, key, value, key_scale, value_scale, blocks, start, full, first, length,
            position, slope, scale, softcap, window, stride_block, stride_token, stride_scale,
            BLOCK_SIZE, DIM, TILE, CAUSAL, False,
        )  # fmt: skip
        start = full
        block = block_ids(blocks, start, length, BLOCK_SIZE, TILE)
    return walk(
        rows, power, block, acc, top, total, key, value, key_scale, value_scale, blocks, start, stop, first, length,
        position, slope, scale, softcap, window, stride_block, stride_token, stride_scale,
        BLOCK_SIZE, DIM, TILE, CAUSAL, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_seqs", "window", "most_new", "stride_table"],
            do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start", "lse", "slopes", "sinks",
                                            "key_scale", "value_scale"],
            )  # fmt: skip
def decode_kernel(
    query, out, key, value, lse, key_scale, value_scale, block_table, scratch,
    seq_lens, query_start, slopes, sinks, scale, softcap, window,
    num_seqs, kv_heads, group, most_new, stride_query_token, stride_query_head, stride_block, stride_kv_head,
    stride_token, stride_scale, stride_scale_head, stride_table,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, SEQS: tl.constexpr,
    CAUSAL: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One share.

    query, out     [tokens, heads, DIM], query by strides               lse            [tokens, heads] or None
    key, value     [blocks, kv_heads, BLOCK_SIZE, DIM] by strides       slopes, sinks  [heads] or None
    key_scale, value_scale  [blocks, kv_heads, BLOCK_SIZE] by strides, or None   scratch  see ``_views``
    block_table    [seqs, width] by stride_table    seq_lens [seqs]     query_start    [seqs + 1]
    """
    cta, ctas = tl.program_id(0), tl.num_programs(0)
    cuts = _views(scratch, ctas, ROWS, PADDED_DIM)[2]
    tiles, tile, share_end, seq, before = _locate(
        cta, ctas, num_seqs, kv_heads, seq_lens, query_start, window, most_new, TILE, TOKENS, SEQS
    )
    part = 2 * cta
    while tile < share_end:
        count, length, token, new = _sequence(seq, num_seqs, seq_lens, query_start, window, most_new, TILE)
        queries = (new + TOKENS - 1) // TOKENS
        if tile >= (before + count * queries) * kv_heads:
            before += count * queries
            seq += 1
        else:
            index = (tile - before * kv_heads) // count
            item = before * kv_heads + index * count  # its first tile
            head, offset = index // queries, index % queries * TOKENS
            begin, end = tile - item, tl.minimum(count, share_end - item)
            acc, top, total = _attend(
                query, key, value, key_scale, value_scale, block_table + tl.cast(seq, tl.int64) * stride_table, slopes,
                scale, softcap, window, token, offset, new, length, begin, end, head, group, stride_query_token,
                stride_query_head, stride_block, stride_kv_head, stride_token, stride_scale, stride_scale_head,
                BLOCK_SIZE, DIM, PADDED_DIM, ROWS, TILE, TOKENS, CAUSAL,
            )  # fmt: skip
            whole = (begin == 0) & (end == count)
            _store(out, lse, acc, top, total, sinks, scratch, part, ctas, whole, token + offset,
                   tl.minimum(new - offset, TOKENS), head, group, kv_heads * group, ROWS, DIM, PADDED_DIM)  # fmt: skip
            if begin == 0:
                shares = tl.where(whole, 0, _share_of(item + count - 1, tiles, ctas) - cta + 1)
                cut = cuts + _item(seq, head, offset, kv_heads, most_new, TOKENS) * 2
                tl.store(cut, part)
                tl.store(cut + 1, shares)
            tile, part = item + end, 2 * cta + 1
    if CHAINED:
        cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["ctas", "num_seqs", "num_tokens", "most_new"],
            do_not_specialize_on_alignment=["query_start", "sinks", "lse"])  # fmt: skip
def join_kernel(
    out, lse, scratch, query_start, sinks, ctas, num_seqs, num_tokens, kv_heads, group, most_new,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Join the parts of one new token under one query head; the programs past the last fill the rows past the batch.

    Tensors as in ``decode_kernel``.
    """
    part_out, part_lse, cuts = _views(scratch, ctas, ROWS, PADDED_DIM)
    seq, head, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_start + seq)
    new = tl.load(query_start + seq + 1, mask=seq < num_seqs, other=0) - token
    ours = (offset < new) & (new <= most_new)
    if CHAINED:
        cuda.gdc_wait()
    cut = cuts + _item(seq, head // group, offset, kv_heads, most_new, TOKENS) * 2
    part, shares = tl.load(cut, mask=ours, other=0), tl.load(cut + 1, mask=ours, other=0)
    if seq == num_seqs:
        for start in range(token + offset * ROWS, num_tokens, most_new * ROWS):
            store_nothing(out, lse, start, num_tokens, head, kv_heads * group, ROWS, DIM, PADDED_DIM)
    elif shares > 0:
        row = offset % TOKENS * group + head % group
        _join_row(part_out, part_lse, sinks, out, lse, part, shares, row, head, token + offset,
                  kv_heads * group, DIM, PADDED_DIM, ROWS)  # fmt: skip


@triton.jit
def _join_row(part_out, part_lse, sinks, out, lse, part, shares, row, head, token, heads,
              DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    dim = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_DIM], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for base in range(0, shares, JOINED):
        share = base + tl.arange(0, JOINED)
        parts = tl.where(share == 0, part, (part // 2 + share) * 2)
        where = parts.to(tl.int64) * ROWS + row
        bits = tl.load(part_lse + where, mask=share < shares, other=float("-inf"))
        values = tl.load(part_out + where[:, None] * PADDED_DIM + dim[None, :], mask=(share < shares)[:, None], other=0)
        new_top = tl.maximum(top, tl.max(bits, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(bits - shift)
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, 0)
        acc = acc * kept + tl.sum(values * weights[:, None], 0)
        top = new_top
    acc = acc[None, :]
    if sinks is not None:
        acc, top, total = add_sink(acc, top, total, tl.load(sinks + head + tl.arange(0, 1)))
    values, bits = normalise(acc, top, total)
    store_rows(out, lse, values, bits, token, 1, head, 1, heads, 1, DIM, PADDED_DIM)


_decode, _decode_takes = Launcher(decode_kernel), taking(*Tensors._fields)
_join, _join_takes = Launcher(join_kernel), taking("out", "lse", "scratch")


def count_shares(slots: int, kv_heads: int, most_tiles: int) -> int:
    """As many as run at once; a few less if then heads, and so all items of a uniform batch, are cut alike or not."""
    even = slots - slots % kv_heads
    return max(min(even if 16 * even >= 15 * slots else slots, most_tiles), 1)


@dataclass(frozen=True, slots=True)
class _Shares:
    """What follows from a batch's maxima."""

    sizes: DecodeSizes
    padded_dim: int
    tokens: int
    """New tokens that a tile of query rows holds."""
    ctas: int
    scratch_words: int
    chained: bool


@functools.lru_cache(maxsize=256)
def _shares(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    dim: int,
    kv_heads: int,
    group: int,
    most_new: int,
    num_seqs: int,
    max_seq_len: int,
) -> _Shares:
    padded_dim = power_of_two(dim)
    sizes = decode_sizes(dtype, kv_dtype, padded_dim, group, most_new, items=num_seqs * kv_heads)
    tokens = sizes.rows // group
    items = num_seqs * kv_heads * -(-most_new // tokens)
    ctas = multiprocessors(device) * sizes.ctas_per_sm
    ctas = count_shares(ctas, kv_heads, most_tiles=items * -(-max(max_seq_len, 1) // sizes.tile))
    words = 2 * ctas * sizes.rows * (padded_dim + 1) + 2 * items
    return _Shares(sizes, padded_dim, tokens, ctas, words, chains(device))


def decode(
    query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams, with_lse: bool, most_new: int
) -> tuple[list[Launch], int]:
    """What attends the sequences of 1 to ``most_new`` new tokens, and fills the rows past the batch.

    Arguments as in ``Backend.attention``, checked. Returns launches over ``Tensors``, and how many words of float32
    their scratch memory has.
    """
    num_tokens, heads, dim = query.shape
    _, kv_heads, block_size, _ = kv.key.shape
    device, num_seqs, group = query.device, batch.num_seqs, heads // kv_heads
    share = _shares(device, query.dtype, kv.key.dtype, dim, kv_heads, group, most_new, num_seqs, batch.max_seq_len)
    sizes, padded_dim, tokens, chained = share.sizes, share.padded_dim, share.tokens, share.chained
    causal = params.causal and most_new > 1  # one new token is the last, and sees all there are
    seqs = 32 if num_seqs <= 32 else 256
    key, strides = form_of(query, kv, params, with_lse, sizes, seqs, causal)
    attend = Launch(
        _decode, (share.ctas, 1, 1), key, _decode_takes,
        (
            batch.seq_lens, batch.query_start, params.alibi_slopes, params.sinks,
            *numbers_of(params, dim), num_seqs, kv_heads, group, most_new, *strides, batch.block_table.stride(0),
            block_size, dim, padded_dim, sizes.rows, sizes.tile, tokens, seqs, causal, chained,
        ),
        {"num_warps": sizes.warps, "num_stages": sizes.stages},
    )  # fmt: skip
    join = Launch(
        _join, (num_seqs + 1, heads, most_new), key, _join_takes,
        (
            batch.query_start, params.sinks, share.ctas, num_seqs, num_tokens, kv_heads, group, most_new,
            dim, padded_dim, sizes.rows, tokens, chained,
        ),
        {"num_warps": 2} | ({"launch_pdl": True} if chained else {}),
    )  # fmt: skip
    return [attend, join] if num_seqs else [join], share.scratch_words
