"""``write_kv``: new keys and values into their slots, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemgr.backends.interface import LARGEST, LEAST_SCALE, KVLayer

from .launch import Launch, Launcher, scale_strides
from .sizes import power_of_two

TOKENS = 32
"""Tokens of one head that a CTA stores."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantise(rows, kind: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """Rows as ``kind``, and their scales."""
    rows = rows.to(tl.float32)
    scales = tl.reduce(tl.abs(rows), 1, _larger) / LARGEST
    scales = tl.where(scales < LEAST, 0.0, scales)
    ratio = rows / tl.where(scales == 0, float("inf"), scales)[:, None]
    if kind == tl.int8:
        ratio = (ratio + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to a whole number, half to even
    return ratio.to(kind), scales


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots", "key_scale", "value_scale"])
def write_kernel(
    new_key, new_value, key, value, key_scale, value_scale, slots, num_tokens,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head, stride_block, stride_head, stride_token,
    stride_scale, stride_scale_head,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head.

    new_key, new_value  [num_tokens, kv_heads, DIM] by strides
    key, value          [blocks, kv_heads, BLOCK_SIZE, DIM] by strides, alike
    key_scale, value_scale  float32 [blocks, kv_heads, BLOCK_SIZE] by strides, alike, or None
    slots               int64 [num_tokens], -1 writes nothing
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    inside = (slot >= 0)[:, None] & (dim < DIM)
    keys = tl.load(new_key + (token * stride_key_token + head * stride_key_head)[:, None] + dim, mask=inside, other=0.0)
    values = tl.load(
        new_value + (token * stride_value_token + head * stride_value_head)[:, None] + dim, mask=inside, other=0.0
    )
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    where = (block * stride_block + head * stride_head + offset * stride_token)[:, None] + dim
    if key_scale is None:
        tl.store(key + where, keys, mask=inside)
        tl.store(value + where, values, mask=inside)
    else:
        scale_where = block * stride_scale + head * stride_scale_head + offset
        keys, key_scales = _quantise(keys, key.dtype.element_ty, LARGEST, LEAST)
        values, value_scales = _quantise(values, value.dtype.element_ty, LARGEST, LEAST)
        tl.store(key + where, keys, mask=inside)
        tl.store(value + where, values, mask=inside)
        tl.store(key_scale + scale_where, key_scales, mask=slot >= 0)
        tl.store(value_scale + scale_where, value_scales, mask=slot >= 0)


_write = Launcher(write_kernel)


def prepare(key: torch.Tensor, value: torch.Tensor, kv: KVLayer) -> list[Launch]:
    """For tensors of these shapes, strides and types; arguments as in ``Backend.write_kv``, checked."""
    num_tokens, kv_heads, dim = key.shape
    if num_tokens == 0:
        return []
    block_size = kv.key.shape[2]
    strides = (*key.stride()[:2], *value.stride()[:2], *kv.key.stride()[:3], *scale_strides(kv))
    return [
        Launch(
            _write,
            (-(-num_tokens // TOKENS), kv_heads, 1),
            (key.device, key.dtype, kv.key.dtype, strides, block_size, dim),
            tuple,
            (
                num_tokens, *strides,
                block_size, dim, power_of_two(dim), TOKENS, LARGEST.get(kv.key.dtype, 0.0), LEAST_SCALE,
            ),
        )
    ]  # fmt: skip
