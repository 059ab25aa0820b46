"""``copy_blocks``: whole blocks, all pairs in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemgr.errors import InvalidInput

from .device import on
from .launch import Launcher, form

CHUNK_BYTES = 16384
"""What a CTA copies at a time; twice as much over the bus to the host's memory."""

BUS_BYTES = 131072
"""Under way at a time, which is as fast as the bus: each CTA more would only slow down whoever computes."""


@triton.jit(do_not_specialize=["tasks"], do_not_specialize_on_alignment=["pairs"])
def copy_kernel(source, target, pairs, words, chunks, tasks, CHUNK: tl.constexpr):
    """One chunk of one pair after the other.

    source, target  words [blocks, words]        pairs  int64 [n, 2]: from, to        tasks  n * chunks
    """
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        pair = task // chunks
        word = (task % chunks) * CHUNK + tl.arange(0, CHUNK)
        block, to = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
        content = tl.load(source + block * words + word, mask=word < words)
        tl.store(target + to * words + word, content, mask=word < words)


_copy = Launcher(copy_kernel)


def copy_blocks(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """Launch; arguments as in ``Backend.copy_blocks``, checked. ``source`` and ``target`` must be contiguous."""
    for name, tier in (("source", source), ("target", target)):
        if not tier.is_contiguous():
            raise InvalidInput(f"{name} must be contiguous, got strides {tier.stride()} for shape {list(tier.shape)}")
    if pairs.shape[0] == 0:
        return
    source, target = _words(source), _words(target)
    words, over_bus = source.shape[1], source.device != target.device
    chunk = CHUNK_BYTES * (1 + over_bus) // source.element_size()
    chunks = -(-words // chunk)
    tasks = pairs.shape[0] * chunks
    fit = BUS_BYTES // (min(words, chunk) * source.element_size()) if over_bus else tasks
    with on(pairs.device):
        _copy(
            (min(tasks, fit), 1, 1),
            form(source, target, depends=(pairs.device, words, chunk)),
            source, target, pairs.contiguous(), words, chunks, tasks, chunk,
        )  # fmt: skip


def _words(pool: torch.Tensor) -> torch.Tensor:
    """The blocks as rows of the widest integers that divide them."""
    rows = pool.view(pool.shape[0], -1).view(torch.uint8)
    for word in (torch.int64, torch.int32, torch.int16):
        if rows.shape[1] % word.itemsize == 0:
            return rows.view(word)
    return rows
