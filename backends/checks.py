"""What is refused before anything is launched. Every backend calls these first, and so all refuse in the same words.

``require`` answers before there are tensors; the ``check_*`` functions look at the tensors of one call, at shapes and
types only, so that they never wait for a device. What a backend did not declare is ``UnsupportedFeature``; tensors that
contradict each other are ``InvalidInput``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from pagemgr.batch import PagedBatch
from pagemgr.errors import InvalidInput, UnsupportedFeature
from pagemgr.layout import BlockLayout

from .interface import LARGEST, AttentionParams, Backend, Capabilities, Feature, KVLayer

_missing = functools.lru_cache(maxsize=1024)(Capabilities.missing)  # every layer of every step asks the same


def require(
    backend: Backend,
    layout: BlockLayout,
    group_size: int,
    device: torch.device | str,
    needs: frozenset[Feature] = frozenset(),
) -> None:
    """Raise ``UnsupportedFeature`` unless the backend serves this pool; ``needs`` are ``AttentionParams.features``."""
    if group_size < 1:
        raise InvalidInput(f"group_size (query heads per K/V head) must be at least 1, got {group_size}")
    dtype, stored = getattr(torch, layout.dtype.value), getattr(torch, layout.stored)
    _refuse(backend, torch.device(device).type, dtype, stored, layout.head_dim, layout.block_size, group_size, needs)


def check_write(
    backend: Backend, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor
) -> None:
    """Check the arguments of ``write_kv``."""
    _, kv_heads, block_size, head_dim = _shape("kv.key", kv.key, 4)
    tokens = (*_shape("slot_mapping", slot_mapping, 1), kv_heads, head_dim)
    dtype, device = _unquantised(kv.key.dtype, key.dtype), kv.key.device
    _refuse(backend, device.type, dtype, kv.key.dtype, head_dim, block_size)
    _expect_alike(kv)
    _expect("key", key, tokens, dtype, device)
    _expect("value", value, tokens, dtype, device)
    _expect("slot_mapping", slot_mapping, tokens[:1], torch.int64, device)


def check_attention(
    backend: Backend,
    query: torch.Tensor,
    kv: KVLayer,
    batch: PagedBatch,
    params: AttentionParams,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Check the arguments of ``attention``."""
    _, kv_heads, block_size, head_dim = _shape("kv.key", kv.key, 4)
    _, heads, _ = _shape("query", query, 3)
    if heads % kv_heads:
        raise InvalidInput(f"query has {heads} heads, which is not a multiple of the {kv_heads} K/V heads")
    dtype, device = _unquantised(kv.key.dtype, query.dtype), kv.key.device
    needs = params.features(with_lse=lse is not None)
    _refuse(backend, device.type, dtype, kv.key.dtype, head_dim, block_size, heads // kv_heads, needs)
    tokens = (batch.num_tokens, heads, head_dim)
    _expect_alike(kv)
    _expect("query", query, tokens, dtype, device)
    width = _shape("batch.block_table", batch.block_table, 2)[1]
    _expect("batch.block_table", batch.block_table, (batch.num_seqs, width), torch.int32, device)
    _expect("batch.seq_lens", batch.seq_lens, (batch.num_seqs,), torch.int32, device)
    _expect("batch.query_start", batch.query_start, (batch.num_seqs + 1,), torch.int32, device)
    for name, tensor in (("alibi_slopes", params.alibi_slopes), ("sinks", params.sinks)):
        if tensor is not None:
            _expect(name, tensor, (heads,), torch.float32, device)
    for name, tensor, shape, kind in (("out", out, tokens, dtype), ("lse", lse, tokens[:2], torch.float32)):
        if tensor is not None:
            _expect(name, tensor, shape, kind, device)
            if not tensor.is_contiguous():
                raise InvalidInput(f"{name} must be contiguous, got strides {tensor.stride()}")


def facts_of(tensor: torch.Tensor | None) -> object:
    """All that a check looks at: a call with the same facts, batch and parameters as one that was checked is right."""
    return tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def check_copy(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """Check the arguments of ``copy_blocks``."""
    device = target.device if source.device.type == "cpu" else source.device
    _expect("pairs", pairs, (*pairs.shape[:1], 2), torch.int64, device)
    if source.shape[1:] != target.shape[1:] or source.dtype is not target.dtype:
        kinds = [f"{tier.dtype} {list(tier.shape[1:])}" for tier in (source, target)]
        raise InvalidInput(f"source and target must have blocks alike, got {kinds[0]} and {kinds[1]}")
    for name, tier in (("source", source), ("target", target)):
        if tier.device != device and not (tier.device.type == "cpu" and tier.is_pinned()):
            where = "host memory that is not pinned" if tier.device.type == "cpu" else str(tier.device)
            raise InvalidInput(f"{name} must be on {device} or in pinned host memory, got {where}")


def check_merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> None:
    """Check the arguments of ``merge``."""
    if not outs or len(outs) != len(lses):
        raise InvalidInput(f"merge takes as many outs as lses, at least one; got {len(outs)} and {len(lses)}")
    shape, dtype, device = _shape("outs[0]", outs[0], 3), outs[0].dtype, outs[0].device
    for part, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _expect(f"outs[{part}]", out, shape, dtype, device)
        _expect(f"lses[{part}]", lse, shape[:2], torch.float32, device)


def _unquantised(stored: torch.dtype, given: torch.dtype) -> torch.dtype:
    """What queries, keys and values have to be: anything if the pool is quantised, else what it holds."""
    return given if stored in LARGEST else stored


def _expect_alike(kv: KVLayer) -> None:
    """Values like keys, and scales for both if they are quantised."""
    key = kv.key
    _expect("kv.value", kv.value, key.shape, key.dtype, key.device)
    for name, scale in (("kv.key_scale", kv.key_scale), ("kv.value_scale", kv.value_scale)):
        if (scale is not None) != (key.dtype in LARGEST):
            wanted = "missing" if scale is None else "given"
            raise InvalidInput(f"{name} is {wanted}, with keys and values stored as {key.dtype}")
        if scale is not None:
            _expect(name, scale, key.shape[:3], torch.float32, key.device)


def _refuse(
    backend: Backend,
    device: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    group_size: int | None = None,
    needs: frozenset[Feature] = frozenset(),
) -> None:
    reasons = _missing(backend.capabilities(), device, dtype, head_dim, block_size, group_size, needs, kv_dtype)
    if reasons:
        raise UnsupportedFeature(backend.name, reasons)


def _shape(name: str, tensor: torch.Tensor, rank: int) -> tuple[int, ...]:
    if tensor.ndim != rank:
        raise InvalidInput(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape == shape and tensor.dtype is dtype and tensor.device == device and tensor.stride(-1) == 1:
        return  # as nearly always: in a small decode step every microsecond of the host counts
    if tuple(tensor.shape) != tuple(shape):
        raise InvalidInput(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise InvalidInput(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise InvalidInput(f"{name} must be on {device}, got {tensor.device}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InvalidInput(f"the last dimension of {name} must be contiguous, got strides {tensor.stride()}")
