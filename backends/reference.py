"""The ``torch`` backend: the definition of correct, on any device that torch runs on.

One sequence at a time: its visible blocks are gathered into dense keys and values, and what follows is the textbook
formula, in float32 (float64 for float64 tensors). Lengths are read on the host: no capture in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pagemgr.batch import PagedBatch

from .checks import check_attention, check_copy, check_merge, check_write
from .interface import LARGEST, LEAST_SCALE, AttentionParams, Capabilities, KVLayer

QUERY_CHUNK = 256
"""Queries attended at once: bounds the score matrix of a long prompt."""

_CAPABILITIES = Capabilities(
    devices=None,
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    kv_dtypes=frozenset(LARGEST),
)


class TorchBackend:
    """Plain torch operations, without gradients; what the methods mean is written in ``pagemgr.backends.Backend``."""

    name = "torch"

    @classmethod
    def probe(cls) -> str | None:
        """None: it runs wherever torch does."""
        return None

    def capabilities(self) -> Capabilities:
        """Every feature, for any shape, on any device."""
        return _CAPABILITIES

    @torch.no_grad()
    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        check_write(self, key, value, kv, slot_mapping)
        written = slot_mapping >= 0
        slots, block_size = slot_mapping[written], kv.key.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        for new, part, scales in ((key, kv.key, kv.key_scale), (value, kv.value, kv.value_scale)):
            rows = new[written]
            if scales is not None:
                rows, scales[blocks, :, offsets] = quantise(rows, part.dtype)
            part[blocks, :, offsets] = rows

    @torch.no_grad()
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
        check_attention(self, query, kv, batch, params, out, lse)
        out = torch.zeros(query.shape, dtype=query.dtype, device=query.device) if out is None else out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        seq_lens = batch.seq_lens.tolist()
        for seq, rows, position in _chunks(batch.query_start.tolist(), seq_lens):
            queries = query[rows]
            first, stop = _visible_range(position, len(queries), seq_lens[seq], params)
            blocks = batch.block_table[seq]
            key, value = (
                _gather(part, scales, blocks, first, stop, _exact(query.dtype))
                for part, scales in ((kv.key, kv.key_scale), (kv.value, kv.value_scale))
            )
            result, denominator = _attend(queries, key, value, position - first, params)
            out[rows] = result.to(out.dtype)
            if lse is not None:
                lse[rows] = denominator.to(lse.dtype)
        return out

    @torch.no_grad()
    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        check_copy(source, target, pairs)
        blocks = source[pairs[:, 0].to(source.device)]
        target[pairs[:, 1].to(target.device)] = blocks.to(target.device)

    @torch.no_grad()
    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Backend.merge``."""
        check_merge(outs, lses)
        dtype = outs[0].dtype
        logits = torch.stack(tuple(lses)).to(_exact(dtype))  # [parts, tokens, heads]
        empty = logits == -torch.inf
        weights = torch.softmax(logits, dim=0).masked_fill(empty, 0)
        values = torch.stack(tuple(outs)).to(_exact(dtype)).masked_fill(empty.unsqueeze(-1), 0)
        merged = torch.einsum("pth,pthd->thd", weights, values)
        return merged.to(dtype), torch.logsumexp(logits, dim=0).to(torch.float32)


def quantise(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[..., n]`` as ``dtype``, one of ``LARGEST``, and their scales, float32 ``[...]``; see ``write_kv``."""
    scales = rows.abs().amax(-1).float() / LARGEST[dtype]
    scales = scales.masked_fill(scales < LEAST_SCALE, 0)
    stored = rows.float() / scales.masked_fill(scales == 0, torch.inf).unsqueeze(-1)
    return (stored.round() if dtype is torch.int8 else stored).to(dtype), scales


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What sums are accumulated in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _chunks(query_start: list[int], seq_lens: list[int]) -> Iterator[tuple[int, slice, int]]:
    """(sequence, its next rows of the query tensor, the position of the first of them)."""
    for seq, seq_len in enumerate(seq_lens):
        start, stop = query_start[seq], query_start[seq + 1]
        for row in range(start, stop, QUERY_CHUNK):
            yield seq, slice(row, min(row + QUERY_CHUNK, stop)), seq_len - (stop - row)


def _visible_range(position: int, num_queries: int, seq_len: int, params: AttentionParams) -> tuple[int, int]:
    """Positions ``[first, stop)`` that hold every key which queries at ``position`` and after see."""
    first = 0 if params.window is None else max(0, position - params.window + 1)
    stop = min(seq_len, position + num_queries) if params.causal else seq_len
    return first, max(first, stop)


def _gather(
    part: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, first: int, stop: int, exact: torch.dtype
) -> torch.Tensor:
    """Positions ``[first, stop)`` of one sequence, dense and exact: ``[num_kv_heads, stop - first, head_dim]``.

    Nothing else is read: what lies in the other slots cannot reach a product, not even times zero.
    """
    block_size = part.shape[2]
    skipped = first // block_size
    wanted = blocks[skipped : -(-stop // block_size)]
    inside = slice(first - skipped * block_size, stop - skipped * block_size)
    rows = part[wanted].transpose(0, 1).flatten(1, 2)[:, inside].to(exact)
    if scales is None:
        return rows
    return rows * scales[wanted].transpose(0, 1).flatten(1, 2)[:, inside].to(exact).unsqueeze(-1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Textbook attention of ``query`` ``[n, heads, dim]`` at ``position`` and after, counted from the first key.

    ``key`` and ``value`` ``[kv_heads, m, dim]``, exact; returns ``[n, heads, dim]`` and the log denominators
    ``[n, heads]``.
    """
    num_queries, heads, dim = query.shape
    kv_heads, num_keys, _ = key.shape
    exact = _exact(query.dtype)
    per_head = (kv_heads, heads // kv_heads, 1, 1)
    scale = dim**-0.5 if params.scale is None else params.scale
    grouped = query.to(exact).view(num_queries, kv_heads, -1, dim)
    scores = scale * torch.einsum("nhgd,hmd->hgnm", grouped, key)
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    positions = torch.arange(position, position + num_queries, device=query.device)
    distance = torch.arange(num_keys, device=query.device) - positions.unsqueeze(1)  # [n, m]
    if params.alibi_slopes is not None:
        scores = scores + params.alibi_slopes.to(exact).view(per_head) * distance
    masked = distance > 0 if params.causal else torch.zeros_like(distance, dtype=torch.bool)
    if params.window is not None:
        masked = masked | (distance <= -params.window)
    scores = scores.masked_fill(masked, -torch.inf)
    if params.sinks is not None:
        sink = params.sinks.to(exact).view(per_head).expand(-1, -1, num_queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys].masked_fill(masked, 0)
    out = torch.einsum("hgnm,hmd->nhgd", weights, value)
    return out.reshape(query.shape), torch.logsumexp(scores, dim=-1).permute(2, 0, 1).flatten(1)
