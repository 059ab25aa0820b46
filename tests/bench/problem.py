"""One shape as tensors: a pool with shuffled blocks, NaN in what is not written, and the same K and V contiguous."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagemgr.backends import AttentionParams, Backend, KVLayer
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch
from pagemgr.layout import BlockLayout, DType, KVDType
from pagemgr.storage import Storage

from .shapes import Shape

PARAMS = AttentionParams()
REFERENCE = TorchBackend()
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest relative error, ‖out − exact‖ / ‖exact‖, over the compared rows of one sequence."""
COMPARED = 256
"""New tokens of a sequence that are compared with the reference, its last ones."""


@dataclass(frozen=True)
class Problem:
    """``key`` and ``value`` are those of all tokens, ``[tokens, num_kv_heads, head_dim]``, as the pool gives them."""

    shape: Shape
    layout: BlockLayout
    query: torch.Tensor
    kv: KVLayer
    batch: PagedBatch
    key: torch.Tensor
    value: torch.Tensor

    @property
    def bytes_read(self) -> int:
        """Of K and V, scales included, once."""
        return self.layout.token_bytes * sum(self.shape.lens)

    def error(self, out: torch.Tensor) -> float:
        """The worst relative error of the first, the last and the longest sequence."""
        lens = self.shape.lens
        return max(self._error(out, row) for row in {0, len(lens) - 1, lens.index(max(lens))})

    def _error(self, out: torch.Tensor, row: int) -> float:
        first = sum(self.shape.lens[:row])
        n, new = self.shape.lens[row], min(self.shape.news[row], COMPARED)
        end = sum(self.shape.news[: row + 1])
        key, value = (part[first : first + n].float().transpose(0, 1)[None] for part in (self.key, self.value))
        device = self.query.device
        one = PagedBatch(
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([n], dtype=torch.int32, device=device),
            query_start=torch.tensor([0, new], dtype=torch.int32, device=device),
            slot_mapping=torch.full((new,), -1, device=device),
            max_query_len=new,
            max_seq_len=n,
        )
        exact = REFERENCE.attention(self.query[end - new : end].float(), KVLayer(key, value), one, PARAMS)
        return float((out[end - new : end].float() - exact).norm() / exact.norm())


def build(shape: Shape, device: torch.device, dtype: str, kv_dtype: str = "auto") -> Problem:
    """Random tensors of this shape."""
    counts = [-(-n // shape.block_size) for n in shape.lens]
    layout = BlockLayout(1, shape.kv_heads, shape.head_dim, shape.block_size, DType(dtype), KVDType(kv_dtype))
    storage = Storage(layout, {"device": 1 + sum(counts)}, device, REFERENCE)
    storage.tiers["device"].fill_(0xFF)
    (kv,) = storage.layers
    ids = 1 + torch.randperm(sum(counts), device=device, dtype=torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    for row, part in enumerate(torch.split(ids, counts)):
        table[row, : len(part)] = part
    slots = torch.cat([slots_of(row, n, shape.block_size) for row, n in zip(table, shape.lens, strict=True)])
    wanted = getattr(torch, dtype)
    key, value = (
        torch.randn(len(slots), shape.kv_heads, shape.head_dim, device=device, dtype=wanted) for _ in range(2)
    )
    REFERENCE.write_kv(key, value, kv, slots)
    if kv.key_scale is not None and kv.value_scale is not None:
        at = (slots // shape.block_size, slice(None), slots % shape.block_size)
        key, value = (
            (part[at].float() * scale[at][..., None]).to(wanted)
            for part, scale in ((kv.key, kv.key_scale), (kv.value, kv.value_scale))
        )
    starts = [0, *itertools.accumulate(shape.news)]
    batch = PagedBatch(
        block_table=table,
        seq_lens=torch.tensor(shape.lens, dtype=torch.int32, device=device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        slot_mapping=torch.full((starts[-1],), -1, device=device),
        max_query_len=max(shape.news),
        max_seq_len=max(shape.lens),
    )
    heads = shape.kv_heads * shape.group
    query = torch.randn(starts[-1], heads, shape.head_dim, device=device, dtype=wanted)
    return Problem(shape, layout, query, kv, batch, key, value)


def attend(backend: Backend, problem: Problem, out: torch.Tensor) -> Callable[[], object]:
    """The call that is timed."""
    return lambda: backend.attention(problem.query, problem.kv, problem.batch, PARAMS, out=out)


def slots_of(row: torch.Tensor, tokens: int, block_size: int) -> torch.Tensor:
    """Of the first tokens of a sequence, given its row of the block table."""
    positions = torch.arange(tokens, device=row.device)
    return row[positions // block_size].long() * block_size + positions % block_size
