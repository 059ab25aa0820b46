"""``TritonBackend``: what is checked, and which launcher does it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from pagemgr.backends.checks import check_attention, check_copy, check_merge, check_write, facts_of
from pagemgr.backends.interface import LARGEST, AttentionParams, Capabilities, KVLayer
from pagemgr.batch import PagedBatch

from .attention import Prepared, prepare
from .copy import copy_blocks
from .device import INTERPRETED
from .launch import Launch, launch_all
from .merge import merge
from .write import prepare as prepare_write

HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 256})
GROUP_SIZES = frozenset(range(1, 33))

_ON_GPU = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    head_dims=HEAD_DIMS,
    group_sizes=GROUP_SIZES,
    kv_dtypes=frozenset(LARGEST),
    graph_capture=True,
)
_ON_OLDER_GPU = replace(_ON_GPU, kv_dtypes=_ON_GPU.kv_dtypes - {torch.float8_e4m3fn})
_INTERPRETED = Capabilities(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float16, torch.float32}),  # the interpreter's product of bfloat16 is wrong
    head_dims=HEAD_DIMS,
    group_sizes=GROUP_SIZES,
    kv_dtypes=frozenset({torch.int8}),  # it rounds to float8 wrongly
)


@functools.cache
def _capabilities() -> Capabilities:
    if INTERPRETED:
        return _INTERPRETED
    has_e4m3 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
    return _ON_GPU if has_e4m3 else _ON_OLDER_GPU


_KEPT = 64
"""Batches of which a prepared call is remembered; a step has as many as its model has kinds of layers."""


class TritonBackend:
    """Triton kernels for NVIDIA GPUs; what the methods mean is written in ``pagemgr.backends.Backend``.

    With ``TRITON_INTERPRET=1`` set before the first import, the same kernels run on the CPU, slowly, for tests.
    Under ``torch.compile`` each method is one operation of ``library``.
    """

    name = "triton"

    @classmethod
    def probe(cls) -> str | None:
        """None with a CUDA GPU of compute capability 8.0 or later, or with Triton's interpreter."""
        if INTERPRETED:
            return None
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch finds no CUDA GPU (on a CPU, TRITON_INTERPRET=1 runs the kernels slowly, for tests)"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, 8.0 is needed"

    def __init__(self) -> None:
        self._attentions: dict[tuple[int, int], tuple[object, Prepared]] = {}
        """The last call for a batch and parameters: facts of its tensors, and what was prepared for them."""
        self._write: tuple[object, list[Launch]] = ((), [])
        """The last call of ``write_kv``, likewise."""

    def capabilities(self) -> Capabilities:
        """Every feature; head dims and group sizes as listed; any block size; float8_e4m3fn from 8.9 on."""
        return _capabilities()

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        if torch.compiler.is_compiling():
            torch.ops.pagemgr.triton_write_kv(key, value, kv.key, kv.value, kv.key_scale, kv.value_scale, slot_mapping)
        else:
            tensors = (key, value, kv.key, kv.value, kv.key_scale, kv.value_scale, slot_mapping)
            facts = tuple(map(facts_of, tensors))
            known, launches = self._write
            if known != facts:
                check_write(self, key, value, kv, slot_mapping)
                launches = prepare_write(key, value, kv)
                self._write = (facts, launches)
            launch_all(launches, tensors, key.device)

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Backend.attention``."""
        if torch.compiler.is_compiling():
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
            torch.ops.pagemgr.triton_attention(
                query, kv.key, kv.value, kv.key_scale, kv.value_scale,
                batch.block_table, batch.seq_lens, batch.query_start, batch.slot_mapping,
                batch.max_query_len, batch.max_seq_len, params.scale, params.causal, params.window, params.softcap,
                params.alibi_slopes, params.sinks, out, lse,
            )  # fmt: skip
            return out
        facts = tuple(map(facts_of, (query, kv.key, kv.value, kv.key_scale, kv.value_scale, out, lse)))
        call = (id(batch), id(params))
        known, prepared = self._attentions.get(call, (None, None))
        if prepared is None or known != facts:
            check_attention(self, query, kv, batch, params, out, lse)
            prepared = prepare(query, kv, batch, params, lse is not None)
            if len(self._attentions) >= _KEPT:
                self._attentions.clear()
            self._attentions[call] = (facts, prepared)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        prepared(query, kv, out, lse)
        return out

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        if torch.compiler.is_compiling():
            torch.ops.pagemgr.triton_copy_blocks(source, target, pairs)
        else:
            check_copy(source, target, pairs)
            copy_blocks(source, target, pairs)

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Backend.merge``."""
        if torch.compiler.is_compiling():
            out, lse = torch.ops.pagemgr.triton_merge(list(outs), list(lses))
            return out, lse
        check_merge(outs, lses)
        return merge(outs, lses)


from . import library as library  # noqa: E402 - it registers the operations, which call the class above
