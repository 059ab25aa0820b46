"""``copy_blocks``: whole blocks, all pairs in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemgr.errors import InvalidInput

from .device import on
from .launch import Launcher, form

CHUNK_BYTES = 16384
"""What a CTA copies."""


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def copy_kernel(pool, pairs, words, chunks, CHUNK: tl.constexpr):
    """One chunk of one pair.

    pool   words [blocks, words]        pairs  int64 [n, 2]: from, to
    """
    pair = tl.program_id(0) // chunks
    word = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    content = tl.load(pool + source * words + word, mask=word < words)
    tl.store(pool + target * words + word, content, mask=word < words)


_copy = Launcher(copy_kernel)


def copy_blocks(pool: torch.Tensor, pairs: torch.Tensor) -> None:
    """Launch; arguments as in ``Backend.copy_blocks``, checked. ``pool`` must be contiguous."""
    if not pool.is_contiguous():
        raise InvalidInput(f"pool must be contiguous, got strides {pool.stride()} for shape {list(pool.shape)}")
    if pairs.shape[0] == 0:
        return
    words = _words(pool)
    chunk = CHUNK_BYTES // words.element_size()
    chunks = -(-words.shape[1] // chunk)
    with on(pool.device):
        _copy(
            (pairs.shape[0] * chunks, 1, 1),
            form(words, depends=(words.shape[1], chunk)),
            words, pairs.contiguous(), words.shape[1], chunks, chunk,
        )  # fmt: skip


def _words(pool: torch.Tensor) -> torch.Tensor:
    """The blocks as rows of the widest integers that divide them."""
    rows = pool.view(pool.shape[0], -1).view(torch.uint8)
    for word in (torch.int64, torch.int32, torch.int16):
        if rows.shape[1] % word.itemsize == 0:
            return rows.view(word)
    return rows
