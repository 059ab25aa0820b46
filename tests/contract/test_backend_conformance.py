"""The conformance suite on the torch backend and on a second, independent one; and that it catches what is broken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pagemgr.backends import AttentionParams, Capabilities, Feature, KVLayer
from pagemgr.backends.checks import check_attention, check_write
from pagemgr.backends.conformance import ConformanceSuite, checks
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch

pytest_plugins = "pytester"


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
            graph_capture=True,
        )

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        check_write(self, key, value, kv, slot_mapping)
        blocks, _, size, _ = kv.key.shape
        tokens = torch.arange(len(key), device=key.device)
        writer = torch.full((blocks * size + 1,), -1, dtype=torch.int64, device=key.device)
        writer[self.target(slot_mapping, blocks * size)] = tokens
        writer = writer[:-1].view(blocks, size)
        for new, part in ((key, kv.key), (value, kv.value)):
            if len(new):
                rows = new[writer.clamp(min=0)].transpose(1, 2)
                part.copy_(torch.where((writer >= 0)[:, None, :, None], rows, part))

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
        keys, values = (part[table].transpose(2, 3).flatten(1, 2)[:, :, group] for part in (kv.key, kv.value))
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

    def copy_blocks(self, pool: torch.Tensor, pairs: torch.Tensor) -> None:
        pool.index_copy_(0, pairs[:, 1], pool.index_select(0, pairs[:, 0]))

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -math.inf)
        for part, part_lse in zip(outs, lses, strict=True):
            total = torch.logaddexp(lse, part_lse)
            old, new = (torch.exp(term - total.clamp(min=-1e30))[..., None] for term in (lse, part_lse))
            out = torch.where(old > 0, out * old, 0) + torch.where(new > 0, part * new, 0)
            lse = total
        return out, lse


class TestTorch(ConformanceSuite):
    backend = TorchBackend


class TestTorchOtherInputs(ConformanceSuite):
    backend = TorchBackend
    seed = 20261124


@pytest.mark.gpu
class TestTorchOnCuda(ConformanceSuite):
    backend = TorchBackend
    device = "cuda"


class TestDense(ConformanceSuite):
    backend = DenseBackend


@pytest.mark.gpu
class TestDenseOnCuda(ConformanceSuite):
    backend = DenseBackend
    device = "cuda"


class LetsNaNThrough(DenseBackend):
    def clean(self, values, seen):
        return values


class IgnoresWindow(DenseBackend):
    def sees(self, distance, params):
        return super().sees(distance, replace(params, window=None))


class WindowOneTooLong(DenseBackend):
    def sees(self, distance, params):
        return super().sees(distance, replace(params, window=params.window and params.window + 1))


class SeesNextToken(DenseBackend):
    def sees(self, distance, params):
        return super().sees(distance - 1, params)


class MissesItself(DenseBackend):
    def sees(self, distance, params):
        return super().sees(distance, params) & (distance != 0)


class AlwaysCausal(DenseBackend):
    def sees(self, distance, params):
        return super().sees(distance, replace(params, causal=True))


class ForgetsCachedTokens(DenseBackend):
    """Takes each chunk of a prompt for its beginning."""

    def position(self, row, length, start, seq):
        return row - start[seq]


class InterleavesHeads(DenseBackend):
    def kv_head_of(self, head, heads, kv_heads):
        return head % kv_heads


class IgnoresScale(DenseBackend):
    def logits(self, product, distance, params):
        return super().logits(product, distance, replace(params, scale=None))


class CapsAlibi(DenseBackend):
    """Adds the slopes before the softcap."""

    def logits(self, product, distance, params):
        if params.softcap is None:
            return super().logits(product, distance, params)
        biased = super().logits(product, distance, replace(params, softcap=None))
        return params.softcap * torch.tanh(biased / params.softcap)


class FlipsAlibi(DenseBackend):
    def logits(self, product, distance, params):
        return super().logits(product, -distance, params)


class IgnoresSinks(DenseBackend):
    def softmax(self, logits, values, params):
        return super().softmax(logits, values, replace(params, sinks=None))


class LeavesSinksOutOfLse(DenseBackend):
    def softmax(self, logits, values, params):
        out, _ = super().softmax(logits, values, params)
        return out, torch.logsumexp(logits, -1)


class LseInBits(DenseBackend):
    def softmax(self, logits, values, params):
        out, lse = super().softmax(logits, values, params)
        return out, lse / math.log(2)


class WeightsInBfloat16(DenseBackend):
    def softmax(self, logits, values, params):
        return super().softmax(logits.bfloat16().float(), values, params)


class DividesByZero(DenseBackend):
    """A query that sees no key gives NaN."""

    def softmax(self, logits, values, params):
        out, lse = super().softmax(logits, values, params)
        return out.masked_fill(logits.amax(-1, keepdim=True) == -math.inf, math.nan), lse


class AttendsPadding(DenseBackend):
    """Takes rows past the last sequence for its tokens."""

    def is_real(self, seq, num_seqs):
        return torch.ones_like(seq, dtype=torch.bool)


class IgnoresOut(DenseBackend):
    def attention(self, query, kv, batch, params, out=None, lse=None):
        return super().attention(query, kv, batch, params, None, lse)


class CleansThePool(DenseBackend):
    """Zeroes what others may own."""

    def attention(self, query, kv, batch, params, out=None, lse=None):
        kv.value.nan_to_num_()
        return super().attention(query, kv, batch, params, out, lse)


class AssumesContiguousLayer(DenseBackend):
    def attention(self, query, kv, batch, params, out=None, lse=None):
        strides = torch.empty(kv.key.shape).stride()
        flat = KVLayer(*(part.as_strided(part.shape, strides) for part in (kv.key, kv.value)))
        return super().attention(query, flat, batch, params, out, lse)


class NeverRefuses(DenseBackend):
    def check(self, *call):
        pass


class RefusesTooLate(DenseBackend):
    def attention(self, query, kv, batch, params, out=None, lse=None):
        if out is not None:
            out.fill_(1)
        return super().attention(query, kv, batch, params, out, lse)


class WritesPaddingToLastSlot(DenseBackend):
    def target(self, slots, beyond):
        return slots % beyond


class WritesPaddingToFirstSlot(DenseBackend):
    def target(self, slots, beyond):
        return slots.clamp(min=0)


class SwapsKeyAndValue(DenseBackend):
    def write_kv(self, key, value, kv, slot_mapping):
        super().write_kv(value, key, kv, slot_mapping)


class CopiesBackwards(DenseBackend):
    def copy_blocks(self, pool, pairs):
        super().copy_blocks(pool, pairs.flip(1))


class CopiesOneLayer(DenseBackend):
    def copy_blocks(self, pool, pairs):
        super().copy_blocks(pool[:, :1], pairs)


class MergesWithoutMaximum(DenseBackend):
    def merge(self, outs, lses):
        weights = torch.stack(tuple(lses)).exp()
        values = torch.stack(tuple(outs)).masked_fill(weights[..., None] == 0, 0)
        return (weights[..., None] * values).sum(0) / weights.sum(0).clamp(min=1e-30)[..., None], weights.sum(0).log()


class MergesEmptyParts(DenseBackend):
    """Lets a part without keys speak: zero times whatever it holds."""

    def merge(self, outs, lses):
        weights = torch.stack(tuple(lses)).softmax(0)[..., None]
        return (weights * torch.stack(tuple(outs))).sum(0), torch.stack(tuple(lses)).logsumexp(0)


class AveragesParts(DenseBackend):
    def merge(self, outs, lses):
        return torch.stack(tuple(outs)).nanmean(0).nan_to_num(), super().merge(outs, lses)[1]


@pytest.mark.parametrize("broken", DenseBackend.__subclasses__(), ids=lambda broken: broken.__name__)
def test_broken_backends_are_caught(broken: type[DenseBackend]) -> None:
    def fails(check) -> bool:
        try:
            check.run()
        except AssertionError:
            return True
        return False

    assert any(fails(check) for check in checks(broken(), "cpu"))


@pytest.mark.gpu
def test_a_backend_that_synchronises_cannot_claim_graph_capture() -> None:
    class Claims(TorchBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), graph_capture=True)

    (check,) = (check for check in checks(Claims(), "cuda") if check.name == "graph-capture")
    with pytest.raises(RuntimeError, match="captur"):
        check.run()


def test_a_device_that_is_not_declared_is_caught() -> None:
    (check,) = (check for check in checks(DenseBackend(), "meta") if check.name == "declares-device")
    with pytest.raises(AssertionError, match="tested on meta"):
        check.run()


def test_only_what_is_declared_is_tested() -> None:
    class Plain(DenseBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), features=frozenset({Feature.causal}))

    found = {check.name for check in checks(Plain(), "cpu")}
    assert "attention-refuses-alibi" in found
    assert "attention-causal-alibi" not in found
    for check in checks(Plain(), "cpu"):
        check.run()


def test_an_unavailable_backend_is_skipped_with_its_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from pagemgr.backends.conformance import ConformanceSuite
        from pagemgr.backends.reference import TorchBackend

        class Absent(TorchBackend):
            @classmethod
            def probe(cls):
                return "the moon is not full"

        class TestAbsent(ConformanceSuite):
            backend = Absent
        """
    )
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*the moon is not full*"])
