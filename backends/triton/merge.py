"""``merge``: attention over disjoint sets of keys into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .device import on
from .sizes import power_of_two
from .tile import LOG2E, normalise

ROWS = 16
"""(token, head) pairs that a CTA merges."""


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(outs, lses, out, lse, num_rows, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows.

    outs  tuple of [num_rows, DIM], lses  tuple of float32 [num_rows];  out, lse  alike
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    inside = (row < num_rows)[:, None] & (dim < DIM)
    where = row[:, None] * DIM + dim
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(len(outs)):
        bits = tl.load(lses[part] + row, mask=row < num_rows, other=float("-inf")) * LOG2E
        # A part without keys may hold anything.
        values = tl.load(outs[part] + where, mask=inside & (bits != float("-inf"))[:, None], other=0).to(tl.float32)
        new_top = tl.maximum(top, bits)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, kept = tl.exp2(bits - shift), tl.exp2(top - shift)
        acc = acc * kept[:, None] + values * weight[:, None]
        total = total * kept + weight
        top = new_top
    values, bits = normalise(acc, top, total)
    tl.store(out + where, values.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, bits / LOG2E, mask=row < num_rows)


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; arguments as in ``Backend.merge``, checked."""
    dim = outs[0].shape[2]
    out = torch.empty_like(outs[0], memory_format=torch.contiguous_format)
    lse = torch.empty_like(lses[0], memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out, lse
    with on(out.device):
        merge_kernel[(-(-lse.numel() // ROWS),)](
            tuple(part.contiguous() for part in outs), tuple(part.contiguous() for part in lses), out, lse,
            lse.numel(), DIM=dim, PADDED_DIM=power_of_two(dim), ROWS=ROWS,
        )  # fmt: skip
    return out, lse
