"""The ``cuda`` backend: CUDA C++ of our own, for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pagemgr.batch import PagedBatch

from .checks import check_attention
from .interface import AttentionParams, KVLayer
from .native import BuiltBackend

_KEPT = 256
"""Filled structs; beyond these, those of earlier steps are dropped."""

_POINTERS = ("query", "out", "block_table", "seq_lens", "query_start", "workspace", "lse", "alibi_slopes", "sinks")


@dataclass(frozen=True, slots=True)
class _Call:
    """A struct that was filled, and the same memory as words of 64 bits."""

    args: Any
    words: Any
    workspace_bytes: int


class CudaBackend(BuiltBackend):
    """Paged attention over device memory by ``native/cuda``.

    The layers of a step call ``attention`` with other pointers and nothing else new: the struct that the first of these
    calls has checked and filled is kept for the others, which exchange the pointers. That is less than half the work.
    """

    name = "cuda"

    @classmethod
    def probe(cls) -> str | None:
        """Why the library cannot be built or has nothing to run on, if so."""
        if not torch.cuda.is_available():
            return "torch finds no CUDA device: install a driver and the CUDA build of torch"
        return super().probe()

    def __init__(self) -> None:
        super().__init__()
        offset = self.library.ffi.offsetof
        struct = "pagemgr_attention_args"
        self._word = {name: offset(struct, name) // 8 for name in _POINTERS}
        self._word |= {name: offset(struct, "kv", name) // 8 for name in ("key", "value", "key_scale", "value_scale")}
        self._word["stream"] = offset(struct, "run", "stream") // 8
        self._idle: dict[tuple[Any, ...], _Call] = {}  # a call takes its own out, so that no two threads use it at once

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
        device = query.device
        out = torch.empty(query.shape, dtype=query.dtype, device=device) if out is None else out
        table, seq_lens, query_start = batch.block_table, batch.seq_lens, batch.query_start
        slopes, sinks = params.alibi_slopes, params.sinks
        signature = (
            *map(_facts, (query, kv.key, kv.value, out, table, seq_lens, query_start, lse, slopes, sinks)),
            *map(_facts, (kv.key_scale, kv.value_scale)),
            *(batch.slot_mapping.shape, batch.max_query_len, batch.max_seq_len),
            *(params.scale, params.causal, params.window, params.softcap),
        )
        call = self._idle.pop(signature, None)
        if call is None:
            check_attention(self, query, kv, batch, params, out, lse)
            call = self._fill(query, kv, batch, params)
        words, word = call.words, self._word
        workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=device)
        words[word["query"]], words[word["out"]] = query.data_ptr(), out.data_ptr()
        words[word["key"]], words[word["value"]] = kv.key.data_ptr(), kv.value.data_ptr()
        words[word["key_scale"]] = 0 if kv.key_scale is None else kv.key_scale.data_ptr()
        words[word["value_scale"]] = 0 if kv.value_scale is None else kv.value_scale.data_ptr()
        words[word["block_table"]], words[word["seq_lens"]] = table.data_ptr(), seq_lens.data_ptr()
        words[word["query_start"]], words[word["workspace"]] = query_start.data_ptr(), workspace.data_ptr()
        words[word["lse"]] = 0 if lse is None else lse.data_ptr()
        words[word["alibi_slopes"]] = 0 if slopes is None else slopes.data_ptr()
        words[word["sinks"]] = 0 if sinks is None else sinks.data_ptr()
        words[word["stream"]] = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.library.call("attention", call.args)
        if len(self._idle) >= _KEPT:
            self._idle.clear()
        self._idle[signature] = call
        return out

    def _fill(self, query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams) -> _Call:
        args = self._attention_args(query, kv, batch, params)
        return _Call(args, self.library.ffi.cast("int64_t *", args), args.workspace_bytes)


def _facts(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """All that decides whether a tensor fits."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
