"""``TritonBackend``: what is checked, and which launcher does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagemgr.backends.checks import check_attention, check_copy, check_merge, check_write
from pagemgr.backends.interface import AttentionParams, Capabilities, KVLayer
from pagemgr.batch import PagedBatch

from .attention import attention
from .copy import copy_blocks
from .device import INTERPRETED
from .merge import merge
from .write import write_kv

HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 256})
GROUP_SIZES = frozenset(range(1, 33))

_ON_GPU = Capabilities(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    head_dims=HEAD_DIMS,
    group_sizes=GROUP_SIZES,
    graph_capture=True,
)
_INTERPRETED = Capabilities(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float16, torch.float32}),  # the interpreter's product of bfloat16 is wrong
    head_dims=HEAD_DIMS,
    group_sizes=GROUP_SIZES,
)


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

    def capabilities(self) -> Capabilities:
        """Every feature; head dims and group sizes as listed; any block size."""
        return _INTERPRETED if INTERPRETED else _ON_GPU

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        if torch.compiler.is_compiling():
            torch.ops.pagemgr.triton_write_kv(key, value, kv.key, kv.value, slot_mapping)
        else:
            check_write(self, key, value, kv, slot_mapping)
            write_kv(key, value, kv, slot_mapping)

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
                query, kv.key, kv.value, batch.block_table, batch.seq_lens, batch.query_start, batch.slot_mapping,
                batch.max_query_len, batch.max_seq_len, params.scale, params.causal, params.window, params.softcap,
                params.alibi_slopes, params.sinks, out, lse,
            )  # fmt: skip
            return out
        check_attention(self, query, kv, batch, params, out, lse)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        attention(query, kv, batch, params, out, lse)
        return out

    def copy_blocks(self, pool: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        if torch.compiler.is_compiling():
            torch.ops.pagemgr.triton_copy_blocks(pool, pairs)
        else:
            check_copy(pool, pairs)
            copy_blocks(pool, pairs)

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Backend.merge``."""
        if torch.compiler.is_compiling():
            out, lse = torch.ops.pagemgr.triton_merge(list(outs), list(lses))
            return out, lse
        check_merge(outs, lses)
        return merge(outs, lses)


from . import library as library  # noqa: E402 - it registers the operations, which call the class above
