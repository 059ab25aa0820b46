"""The operations as torch knows them, ``torch.ops.pagemgr.triton_*``, so that a compiled model may contain them.

Under ``torch.compile`` the backend's methods become these; when such an operation runs, it calls the same method with
real tensors, which checks them and launches. Without compilation nobody pays for torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .backend import TritonBackend


@torch.library.custom_op(
    "pagemgr::triton_write_kv", mutates_args=("key_cache", "value_cache", "key_scale", "value_scale")
)
def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """``Backend.write_kv``."""
    TritonBackend().write_kv(key, value, KVLayer(key_cache, value_cache, key_scale, value_scale), slot_mapping)


@torch.library.custom_op("pagemgr::triton_attention", mutates_args=("out", "lse"))
def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    slot_mapping: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """``Backend.attention`` into a given ``out``."""
    batch = PagedBatch(block_table, seq_lens, query_start, slot_mapping, max_query_len, max_seq_len)
    params = AttentionParams(scale, causal, window, softcap, alibi_slopes, sinks)
    TritonBackend().attention(query, KVLayer(key_cache, value_cache, key_scale, value_scale), batch, params, out, lse)


@torch.library.custom_op("pagemgr::triton_copy_blocks", mutates_args=("target",))
def copy_blocks(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """``Backend.copy_blocks``."""
    TritonBackend().copy_blocks(source, target, pairs)


@torch.library.custom_op("pagemgr::triton_merge", mutates_args=())
def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``Backend.merge``."""
    return TritonBackend().merge(outs, lses)


@write_kv.register_fake
def _(*_: object) -> None:
    """Nothing is returned."""


@attention.register_fake
def _(*_: object) -> None:
    """Nothing is returned."""


@copy_blocks.register_fake
def _(*_: object) -> None:
    """Nothing is returned."""


@merge.register_fake
def _(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
