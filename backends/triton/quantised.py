"""Elements of one byte and their scales.

They are multiplied in float16, which holds all of their types exactly and costs one instruction for two elements, and
their scales go to the products: those of keys to the scores, those of values to the weights. Whatever would leave the
range of float16 is brought into it: queries by a power of two for each row, weights by sums whose reference is the
largest weight times scale, to a power of two, not the largest weight. Queries of float32 are multiplied in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from . import device

INTERPRETED = tl.constexpr(device.INTERPRETED)
"""There, inline assembly cannot run."""


@triton.jit
def widen(rows, kind: tl.constexpr):
    """Elements as ``kind``, exactly."""
    if rows.dtype == kind:
        return rows
    elif rows.dtype == tl.int8 and kind == tl.float16 and not INTERPRETED:
        # The low byte of 1024 + 128 + x, less 1152: converting takes eight times as long.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, minus; xor.b32 x, $2, 0x80808080; mov.b32 minus, 0xe480e480;
            prmt.b32 $0, x, 0x64646464, 0x4140; add.f16x2 $0, $0, minus;
            prmt.b32 $1, x, 0x64646464, 0x4342; add.f16x2 $1, $1, minus; }""",
            "=&r,=&r,r", [rows], dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip
    else:
        return rows.to(kind)


@triton.jit
def unpair(pairs, kind: tl.constexpr):
    """The even and the odd elements of quantised rows that were loaded two by two, as float16."""
    if INTERPRETED:
        even, odd = (pairs & 0xFF).to(tl.uint8), ((pairs >> 8) & 0xFF).to(tl.uint8)
        return even.to(kind, bitcast=True).to(tl.float16), odd.to(kind, bitcast=True).to(tl.float16)
    elif kind == tl.int8:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, minus; xor.b32 x, $2, 0x80808080; mov.b32 minus, 0xe480e480;
            prmt.b32 $0, x, 0x64646464, 0x4240; add.f16x2 $0, $0, minus;
            prmt.b32 $1, x, 0x64646464, 0x4341; add.f16x2 $1, $1, minus; }""",
            "=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    elif kind == tl.float8e5:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x2404; prmt.b32 $1, $2, 0, 0x3414;",
            "=&r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x; .reg .b16 even, odd; prmt.b32 x, $2, 0, 0x3120; mov.b32 {even, odd}, x;
            cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip


@triton.jit
def narrow(rows):
    """Query rows for quantised keys: in float16, at most 1, and the powers of two that they are to be multiplied by.

    Rows of float32 stay as they are, and so do the products.
    """
    if rows.dtype == tl.float32:
        return rows, tl.full([rows.shape[0]], 1.0, tl.float32)
    else:
        rows = rows.to(tl.float32)
        largest = tl.max(tl.abs(rows), 1)
        power = tl.exp2(tl.ceil(tl.log2(tl.where(largest == 0, 1.0, largest))))
        return (rows / power[:, None]).to(tl.float16), power


@triton.jit
def load_scales(keys, values, where, held, MASKED: tl.constexpr):
    """What ``keys`` and ``values`` point to at ``where`` ``[TILE]``, each ``[TILE]``, 0 where not held.

    Triton gives every warp all of what has fewer elements than there are threads, loads and addresses included: hence
    one load for both, doubled where that is not enough.
    """
    TWICE: tl.constexpr = not INTERPRETED and cuda.num_threads() > 2 * where.shape[0]
    pointers, held = tl.where(tl.arange(0, 2) == 0, keys, values)[None, :] + where[:, None], held[:, None]
    if TWICE:
        pointers, held = tl.broadcast_to(pointers[None, :, :], [2, where.shape[0], 2]), held[None, :, :]
    scales = tl.load(pointers, mask=held, other=0.0) if MASKED else tl.load(pointers)
    if TWICE:
        scales, _ = tl.split(tl.trans(scales, 1, 2, 0))
    return tl.split(scales)
