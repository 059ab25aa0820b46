"""What else computes the same attention, as calls to time: torch's own, cuDNN's through it, FlashAttention-3."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .problem import PARAMS, REFERENCE, Problem, build

SDPA, CUDNN, FA3, TORCH = "sdpa", "cudnn", "fa3", "torch"


def peers(problem: Problem, dtype: str) -> dict[str, Callable[[], object]]:
    """Whichever can do this shape: torch and its reference backend on a CPU; cuDNN and FlashAttention-3 on a GPU."""
    if problem.query.device.type == "cpu":
        out = torch.empty_like(problem.query)
        reference = {
            TORCH: lambda: REFERENCE.attention(problem.query, problem.kv, problem.batch, PARAMS, out=out),
        }
        return _sdpa(problem, SDPA) | reference
    return _cudnn(problem) | _flash_attention(problem, dtype)


def _sdpa(problem: Problem, name: str) -> dict[str, Callable[[], object]]:
    """Over K and V already gathered. Its causal mask is that of whole prompts."""
    shape = problem.shape
    if not shape.is_uniform or shape.news[0] not in {1, shape.lens[0]}:
        return {}
    batch = len(shape.lens)
    query, key, value = (
        part.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
        for part in (problem.query, problem.key, problem.value)
    )
    causal, grouped = shape.news[0] > 1, shape.group > 1
    return {name: lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)}


def _cudnn(problem: Problem) -> dict[str, Callable[[], object]]:
    calls = _sdpa(problem, CUDNN)
    if not calls:
        return {}

    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return calls[CUDNN]()

    return {CUDNN: call} if _works(call) else {}


def _flash_attention(problem: Problem, dtype: str) -> dict[str, Callable[[], object]]:
    """On blocks of 128 tokens, which it reads by tensor maps, from a pool of its own; nothing where it is missing."""
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except ImportError:
        return {}
    shape = problem.shape
    if len(set(shape.news)) > 1 or dtype == "float32":
        return {}
    own = build(type(shape)(shape.lens, shape.news, shape.kv_heads, shape.group, shape.head_dim, 128),
                problem.query.device, dtype)  # fmt: skip
    query = own.query.unflatten(0, (len(shape.lens), -1))
    key, value = own.kv.key.transpose(1, 2), own.kv.value.transpose(1, 2)
    key.nan_to_num_(0), value.nan_to_num_(0)

    def call() -> object:
        return flash_attn_with_kvcache(
            query, key, value, cache_seqlens=own.batch.seq_lens, page_table=own.batch.block_table, causal=True
        )

    return {FA3: call} if _works(call) else {}


def _works(call: Callable[[], object]) -> bool:
    """Whether it was built for such a shape."""
    try:
        call()
    except RuntimeError:
        return False
    return True
