"""A tile of keys and values folded into the running softmax of some query rows: what decode and prefill share.

A row is one query token under one query head; the rows of a K/V head's group are packed together, token by token, so
that K and V are read once for all of them. Scores are kept in bits (times log2 e) so that ``exp2`` turns them into
weights; the sums are those of online softmax (Milakov & Gimelshein, 2018; Dao et al., FlashAttention-2, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantised import load_scales, unpair, widen

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(query, first_token, num_tokens, group, stride_token, stride_head, scale,
              ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):  # fmt: skip
    """``[ROWS, PADDED_DIM]`` of ``query`` from ``first_token`` on, zero past ``num_tokens``; negated if scale is."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    token = row // group
    where = (first_token + token).to(tl.int64) * stride_token + (row % group) * stride_head
    inside = (token < num_tokens)[:, None] & (dim < DIM)[None, :]
    rows = tl.load(query + where[:, None] + dim[None, :], mask=inside, other=0.0)
    return tl.where(scale < 0, -rows, rows)


@triton.jit
def block_ids(blocks, start, stop, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """``[TILE]``: the blocks of positions ``start`` and after, read from a row of the block table; 0 from ``stop``."""
    offset = tl.arange(0, TILE)
    # start is a multiple of TILE: where blocks fill tiles, what does not depend on it is computed once.
    whole = start // BLOCK_SIZE + offset // BLOCK_SIZE
    index = whole if TILE % BLOCK_SIZE == 0 else (start + offset) // BLOCK_SIZE
    return tl.load(blocks + index, mask=start + offset < stop, other=0)


@triton.jit
def token_offsets(block, start, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """``[TILE, 1]``: where in one head of the pool the keys (and values) of positions ``start`` and after begin."""
    offset = tl.arange(0, TILE)
    token = offset % BLOCK_SIZE if TILE % BLOCK_SIZE == 0 else (start + offset) % BLOCK_SIZE
    return (block.to(tl.int64) * stride_block + token * stride_token)[:, None]


@triton.jit
def at_head(pointer, head, stride_head):
    """The pointer to a head of block 0, None if there is nothing."""
    if pointer is not None:
        return pointer + head.to(tl.int64) * stride_head


@triton.jit
def no_sums(ROWS: tl.constexpr, PADDED_DIM: tl.constexpr):
    """The running sums of ``fold`` and ``walk`` before the first key."""
    return (
        tl.zeros([ROWS, PADDED_DIM], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@triton.jit
def load_tile(pointers, held, inside, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Elements at ``pointers`` ``[TILE, width]``, 0 where not ``held`` ``[TILE]`` or not ``inside`` ``[width]``.

    MASKED  False promises that all are held; WIDTH elements are inside
    """
    if MASKED:
        return tl.load(pointers, mask=held[:, None] & inside[None, :], other=0.0)
    elif pointers.shape[1] == WIDTH:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def fold(query, power, keys, key_scales, value_scales, top, total, place, held, position, slope,
         scale, softcap, window, CAUSAL: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Fold one tile of keys into the running softmax: weights for the values, and what is kept of earlier sums.

    query            [rows, dim]     keys  [TILE, dim], 0 where not held
    power            [rows]          what ``narrow`` gave; None as are the scales
    key_scales, value_scales         [TILE], 0 where not held; None if keys and values are not quantised
    top, total       [rows]          largest score in bits; sum of weights
    place, held      [TILE]          positions of the keys; whether there is one
    position, slope  [rows]          positions of the queries; ALiBi slopes, or None
    MASKED           False promises that every row sees every key
    """
    scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
    bits = tl.maximum(tl.abs(scale), 1e-30) * LOG2E  # never 0: a masked score stays -inf
    if key_scales is not None:
        scores = scores * key_scales[None, :]
        bits = bits * power[:, None]
    if softcap is not None:
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (bits * -2.0 / softcap))) - 1.0)  # tanh
        bits = LOG2E
    if slope is not None:
        distance = (place[None, :] - position[:, None]).to(tl.float32)
        scores = scores * bits + (slope * LOG2E)[:, None] * distance
        bits = 1.0
    if MASKED:
        seen = held[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] <= position[:, None])
        if window is not None:
            seen = seen & (place[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

    if value_scales is None:
        new_top = tl.maximum(top, tl.max(scores, 1) * bits)
    else:
        # With their exponents, of which 127 is 0; less than -100 would let the sum of weights overflow.
        lift = tl.maximum(value_scales.to(tl.int32, bitcast=True) >> 23, 27).to(tl.float32)
        new_top = tl.maximum(top, tl.max(scores * bits + lift[None, :], 1) - 127.0)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores * bits - shift[:, None])
    kept = tl.exp2(top - shift)
    total = total * kept + tl.sum(weights, 1)
    if value_scales is not None:
        weights = weights * value_scales[None, :]
    return weights, kept, new_top, total


@triton.jit
def walk(query, power, block, acc, top, total, key, value, key_scale, value_scale, blocks, begin, end, first, stop,
         position, slope, scale, softcap, window, stride_block, stride_token, stride_scale,
         BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
         CAUSAL: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Fold the keys at positions ``[begin, end)`` into the running sums; ``begin`` is a multiple of TILE.

    block            what ``block_ids`` gives for ``begin``
    key, value       pointers to this head's dim 0 of token 0 of block 0
    key_scale, value_scale    pointers to this head's token 0 of block 0, whose blocks are stride_scale apart, or None
    blocks           pointer to the sequence's row of the block table
    first, stop      positions outside [first, stop) are never read
    MASKED           False promises that every row sees every key, and that end is a multiple of TILE
    The rest is as in ``fold``.
    """
    # Values of one byte are loaded as pairs: only 16 bits wide can they be turned for the product on their way into
    # registers. From 64 rows on the product takes them from shared memory, as they lie.
    PAIRED: tl.constexpr = key_scale is not None and query.dtype == tl.float16 and query.shape[0] < 64
    WIDTH: tl.constexpr = query.shape[1] // 2 if PAIRED else query.shape[1]
    HELD: tl.constexpr = DIM // 2 if PAIRED else DIM
    UNIT: tl.constexpr = 2 if PAIRED else 1
    kind: tl.constexpr = value.dtype.element_ty
    if PAIRED:
        value = value.to(tl.pointer_type(tl.int16))
        acc, odd = tl.split(tl.reshape(acc, [acc.shape[0], WIDTH, 2]))
    dim = tl.arange(0, query.shape[1])
    value_dim = tl.arange(0, WIDTH)
    key_rows, value_rows = (key + dim)[None, :], (value + value_dim)[None, :]
    for start in tl.range(begin, end, TILE):
        where = token_offsets(block, start, stride_block, stride_token, BLOCK_SIZE, TILE)
        value_where = token_offsets(block, start, stride_block // UNIT, stride_token // UNIT, BLOCK_SIZE, TILE)
        scale_where = block.to(tl.int64) * stride_scale + (start + tl.arange(0, TILE)) % BLOCK_SIZE
        # One tile ahead, so that loading the keys waits for nothing and runs as far ahead as there are stages.
        block = block_ids(blocks, start + TILE, stop, BLOCK_SIZE, TILE)
        place = start + tl.arange(0, TILE)
        held = (place >= first) & (place < stop)
        keys = widen(load_tile(key_rows + where, held, dim < DIM, DIM, MASKED), query.dtype)
        values = load_tile(value_rows + value_where, held, value_dim < HELD, HELD, MASKED)
        key_scales = None
        value_scales = None
        if key_scale is not None:
            key_scales, value_scales = load_scales(key_scale, value_scale, scale_where, held, MASKED)
        weights, kept, top, total = fold(query, power, keys, key_scales, value_scales, top, total, place, held,
                                         position, slope, scale, softcap, window, CAUSAL, MASKED)  # fmt: skip
        if PAIRED:
            even_values, odd_values = unpair(values, kind)
            acc = tl.dot(weights.to(tl.float16), even_values, acc * kept[:, None])
            odd = tl.dot(weights.to(tl.float16), odd_values, odd * kept[:, None])
        else:
            weights = weights.to(query.dtype)
            acc = tl.dot(weights, widen(values, query.dtype), acc * kept[:, None], input_precision="tf32x3")
    if PAIRED:
        acc = tl.reshape(tl.join(acc, odd), [acc.shape[0], 2 * WIDTH])
    return acc, top, total


@triton.jit
def add_sink(acc, top, total, sink):
    """One more key per row with logit ``sink`` ``[rows]``, which takes weight and gives nothing."""
    bits = sink * LOG2E
    new_top = tl.maximum(top, bits)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    kept = tl.exp2(top - shift)
    return acc * kept[:, None], new_top, total * kept + tl.exp2(bits - shift)


@triton.jit
def normalise(acc, top, total):
    """Outputs, and log denominators in bits; 0 and -inf for rows without keys."""
    empty = total == 0
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    return acc / tl.where(empty, 1.0, total)[:, None], lse


@triton.jit
def store_rows(out, lse, values, bits, first_token, num_tokens, first_head, group, heads,
               ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):  # fmt: skip
    """Store what ``normalise`` gave into ``out`` ``[tokens, heads, DIM]`` and, unless None, ``lse`` (natural logs)."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    inside = row // group < num_tokens
    where = (first_token + row // group).to(tl.int64) * heads + first_head + row % group
    tl.store(out + where[:, None] * DIM + dim[None, :], values.to(out.dtype.element_ty),
             mask=inside[:, None] & (dim < DIM)[None, :])  # fmt: skip
    if lse is not None:
        tl.store(lse + where, bits / LOG2E, mask=inside)


@triton.jit
def store_nothing(out, lse, first_token, num_tokens, head, heads,
                  TOKENS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):  # fmt: skip
    """Store 0 and -inf for one head of tokens ``[first_token, num_tokens)``, TOKENS of them at most."""
    token = first_token + tl.arange(0, TOKENS)
    dim = tl.arange(0, PADDED_DIM)
    where = token.to(tl.int64) * heads + head
    inside = token < num_tokens
    tl.store(out + where[:, None] * DIM + dim[None, :], tl.zeros([TOKENS, PADDED_DIM], out.dtype.element_ty),
             mask=inside[:, None] & (dim < DIM)[None, :])  # fmt: skip
    if lse is not None:
        tl.store(lse + where, tl.full([TOKENS], float("-inf"), tl.float32), mask=inside)
