"""Tile sizes: a few rules by what a tile holds. Nothing is tuned at run time, so no first call is slow for that.

The same arguments give the same object, so that a launch may use it as part of a key cheaply.

Measured on an H100; change them only with a measurement beside tests/bench/RESULTS.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MANY_ITEMS = 512
"""(sequence, K/V head) pairs from which on two small CTAs share a multiprocessor better than one large works alone."""

DECODED_ROWS = 64
"""Query rows (new tokens times query heads per K/V head) up to which reading takes longer than multiplying."""

JOINING = 8
"""Tiles of keys that a CTA could walk while parts are stored and joined."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSizes:
    """How ``decode_kernel`` is launched."""

    rows: int
    """Query rows that a tile holds."""
    tile: int
    """Keys that a tile holds."""
    warps: int
    stages: int
    ctas_per_sm: int


@dataclass(frozen=True, slots=True, eq=False)
class PrefillSizes:
    """How ``prefill_kernel`` is launched."""

    rows: int
    tile: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def decode_sizes(
    dtype: torch.dtype, kv_dtype: torch.dtype, padded_dim: int, group: int, most_new: int, items: int
) -> DecodeSizes:
    """For ``items`` (sequence, K/V head) pairs with up to ``group * most_new`` query rows.

    ``dtype`` is that of queries, ``kv_dtype`` that of keys and values in the pool.
    """
    rows = max(16, power_of_two(group * most_new))
    if rows > DECODED_ROWS:
        sizes = prefill_sizes(dtype, padded_dim)
        return DecodeSizes(sizes.rows, sizes.tile, sizes.warps, sizes.stages, ctas_per_sm=1)
    # What is not widened on its way into registers takes as much room as if it was not quantised.
    held = kv_dtype if rows == 16 and dtype is not torch.float32 else dtype
    token_bytes = 2 * padded_dim * held.itemsize  # a key and a value
    if rows > 16:  # 4 warps: Triton 3.6 lays 8 out along 64 rows, which is out of bounds
        return DecodeSizes(rows, _tile(32768, token_bytes), warps=4, stages=3, ctas_per_sm=1)
    if items >= MANY_ITEMS:
        return DecodeSizes(rows, _tile(32768, token_bytes), warps=4, stages=3, ctas_per_sm=2)
    if group == 1:
        return DecodeSizes(rows, _tile(32768, token_bytes), warps=4, stages=2, ctas_per_sm=2)
    tile = _tile(65536, token_bytes)
    return DecodeSizes(rows, tile, warps=8 if tile >= 64 else 4, stages=3, ctas_per_sm=1)


def _tile(stage_bytes: int, token_bytes: int) -> int:
    return min(max(stage_bytes // token_bytes, 16), 256)


@functools.cache
def prefill_sizes(dtype: torch.dtype, padded_dim: int, quantised: bool = False) -> PrefillSizes:
    """For any number of new tokens. What every tile of queries widens for itself is ``quantised``."""
    if dtype is torch.float32:
        return PrefillSizes(rows=32, tile=32 if padded_dim <= 128 else 16, warps=4, stages=2)
    if quantised and padded_dim == 128:  # two CTAs a multiprocessor: one multiplies while the other widens
        return PrefillSizes(rows=64, tile=64, warps=4, stages=3)
    if padded_dim <= 64:
        return PrefillSizes(rows=128, tile=64, warps=4, stages=3)
    return PrefillSizes(rows=128, tile=64 if padded_dim <= 128 else 32, warps=8, stages=3)


def pays_to_cut(items: int, tiles: int, slots: int) -> bool:
    """Whether ``items`` walks over ``tiles`` tiles each, ``slots`` of them at once, gain a fifth if they are cut."""
    return -(-items // slots) * tiles * 4 >= 5 * (items * tiles / slots + JOINING)
