"""``write_kv``: new keys and values into their slots, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemgr.backends.interface import KVLayer

from .device import on
from .launch import Launcher, form
from .sizes import power_of_two

TOKENS = 32
"""Tokens of one head that a CTA stores."""


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots"])
def write_kernel(
    new_key, new_value, key, value, slots, num_tokens,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head, stride_block, stride_head, stride_token,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head.

    new_key, new_value  [num_tokens, kv_heads, DIM] by strides
    key, value          [blocks, kv_heads, BLOCK_SIZE, DIM] by strides, alike
    slots               int64 [num_tokens], -1 writes nothing
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    inside = (slot >= 0)[:, None] & (dim < DIM)
    keys = tl.load(new_key + (token * stride_key_token + head * stride_key_head)[:, None] + dim, mask=inside)
    values = tl.load(new_value + (token * stride_value_token + head * stride_value_head)[:, None] + dim, mask=inside)
    where = slot // BLOCK_SIZE * stride_block + head * stride_head + slot % BLOCK_SIZE * stride_token
    tl.store(key + where[:, None] + dim, keys, mask=inside)
    tl.store(value + where[:, None] + dim, values, mask=inside)


_write = Launcher(write_kernel)


def write_kv(key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
    """Launch; arguments as in ``Backend.write_kv``, checked."""
    num_tokens, kv_heads, dim = key.shape
    if num_tokens == 0:
        return
    block_size = kv.key.shape[2]
    strides = (*key.stride()[:2], *value.stride()[:2], *kv.key.stride()[:3])
    with on(key.device):
        _write(
            (-(-num_tokens // TOKENS), kv_heads, 1),
            form(key, value, kv.key, kv.value, depends=(*strides, block_size, dim)),
            key, value, kv.key, kv.value, slot_mapping, num_tokens, *strides,
            block_size, dim, power_of_two(dim), TOKENS,
        )  # fmt: skip
