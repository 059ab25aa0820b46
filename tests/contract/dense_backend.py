"""A second backend, independent of the torch one, for tests of the conformance suite to break in every way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pagemgr.backends import AttentionParams, Backend, Capabilities, KVLayer
from pagemgr.backends.checks import check_attention, check_write
from pagemgr.backends.conformance import checks
from pagemgr.backends.interface import LARGEST, LEAST_SCALE
from pagemgr.batch import PagedBatch


def is_caught(backend: Backend) -> bool:
    """Whether a check of the suite fails."""
    for check in checks(backend, "cpu"):
        try:
            check.run()
        except AssertionError:
            return True
    return False


class DenseBackend:
    """All tokens against all of their sequence's table at once: wasteful, never synchronises, narrow on purpose."""

    name = "dense"

    @classmethod
    def probe(cls) -> str | None:
        return None

    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset({torch.float32}),
            head_dims=frozenset({32}),
            group_sizes=frozenset({1, 3}),
            block_sizes=frozenset({8, 12}),
            kv_dtypes=frozenset({torch.int8, torch.float8_e5m2}),
            graph_capture=True,
        )

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        check_write(self, key, value, kv, slot_mapping)
        blocks, _, size, _ = kv.key.shape
        tokens = torch.arange(len(key), device=key.device)
        writer = torch.full((blocks * size + 1,), -1, dtype=torch.int64, device=key.device)
        writer[self.target(slot_mapping, blocks * size)] = tokens
        writer = writer[:-1].view(blocks, size)
        written, token = (writer >= 0)[:, None], writer.clamp(min=0)
        for new, part, scale in ((key, kv.key, kv.key_scale), (value, kv.value, kv.value_scale)):
            if len(new) and scale is not None:
                new, scales = self.quantise(new, part.dtype)
                scale.copy_(torch.where(written, scales[token].transpose(1, 2), scale))
            if len(new):
                part.copy_(torch.where(written[..., None], new[token].transpose(1, 2), part))

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.check(query, kv, batch, params, out, lse)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        if batch.num_seqs == 0 or batch.num_tokens == 0:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return out
        heads, kv_heads = query.shape[1], kv.key.shape[1]
        row = torch.arange(batch.num_tokens, device=query.device)
        seq = torch.searchsorted(batch.query_start[1:], row.int(), right=True)
        real, seq = self.is_real(seq, batch.num_seqs), seq.clamp(max=batch.num_seqs - 1)
        length = batch.seq_lens[seq]
        group = self.kv_head_of(torch.arange(heads, device=query.device), heads, kv_heads)
        table = batch.block_table.long()[seq]
        keys, values = (part[table].transpose(2, 3).flatten(1, 2)[:, :, group] for part in self.held(kv))
        key_position = torch.arange(keys.shape[1], device=query.device)
        distance = key_position - self.position(row, length, batch.query_start, seq)[:, None]
        seen = (key_position < length[:, None]) & real[:, None] & self.sees(distance, params)
        logits = self.logits(torch.einsum("thd,tmhd->thm", query, keys), distance[:, None], params)
        logits = torch.where(seen[:, None], logits, -math.inf)
        result, denominator = self.softmax(logits, self.clean(values, seen), params)
        if lse is not None:
            lse.copy_(denominator.masked_fill(~real[:, None], -math.inf))
        out.copy_(result)
        return out

    def check(self, *call: object) -> None:
        check_attention(self, *call)  # type: ignore[arg-type]

    def quantise(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        scales = rows.abs().amax(-1) / LARGEST[dtype]
        scales = torch.where(scales < LEAST_SCALE, 0, scales)
        return self.round(rows / torch.where(scales == 0, math.inf, scales)[..., None], dtype), scales

    def round(self, ratio: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (ratio if dtype.is_floating_point else ratio.round()).to(dtype)

    def held(self, kv: KVLayer) -> tuple[torch.Tensor, torch.Tensor]:
        if kv.key_scale is None or kv.value_scale is None:
            return kv.key, kv.value
        return kv.key.float() * kv.key_scale[..., None], kv.value.float() * kv.value_scale[..., None]

    def target(self, slots: torch.Tensor, beyond: int) -> torch.Tensor:
        return torch.where(slots < 0, beyond, slots)

    def is_real(self, seq: torch.Tensor, num_seqs: int) -> torch.Tensor:
        return seq < num_seqs

    def kv_head_of(self, head: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
        return head // (heads // kv_heads)

    def position(self, row: torch.Tensor, length: torch.Tensor, start: torch.Tensor, seq: torch.Tensor) -> torch.Tensor:
        return length - start[seq + 1] + row

    def sees(self, distance: torch.Tensor, params: AttentionParams) -> torch.Tensor:
        near = distance > -(params.window or math.inf)
        return near & (distance <= 0) if params.causal else near

    def logits(self, product: torch.Tensor, distance: torch.Tensor, params: AttentionParams) -> torch.Tensor:
        logits = product * (32**-0.5 if params.scale is None else params.scale)
        if params.softcap is not None:
            logits = params.softcap * torch.tanh(logits / params.softcap)
        return logits if params.alibi_slopes is None else logits + params.alibi_slopes[:, None] * distance

    def clean(self, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return torch.where(seen[..., None, None], values, 0)

    def softmax(
        self, logits: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sink = torch.full_like(logits[..., 0], -math.inf) if params.sinks is None else params.sinks
        top = torch.maximum(logits.amax(-1), sink)
        top = torch.where(top == -math.inf, 0, top)
        weights = torch.exp(logits - top[..., None])
        total = weights.sum(-1) + torch.exp(sink - top)
        out = torch.einsum("thm,tmhd->thd", weights, values) / torch.where(total == 0, 1, total)[..., None]
        return out, torch.log(total) + top

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        blocks = source.index_select(0, pairs[:, 0].to(source.device))
        target.index_copy_(0, pairs[:, 1].to(target.device), blocks.to(target.device))

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -math.inf)
        for part, part_lse in zip(outs, lses, strict=True):
            total = torch.logaddexp(lse, part_lse)
            old, new = (torch.exp(term - total.clamp(min=-1e30))[..., None] for term in (lse, part_lse))
            out = torch.where(old > 0, out * old, 0) + torch.where(new > 0, part * new, 0)
            lse = total
        return out, lse
