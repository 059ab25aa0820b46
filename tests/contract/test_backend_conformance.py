"""The conformance suite on the torch backend and on a second, independent one; and that it catches what is broken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dense_backend import DenseBackend, is_caught

from pagemgr.backends import Capabilities, Feature, KVLayer
from pagemgr.backends.conformance import ConformanceSuite, checks
from pagemgr.backends.reference import TorchBackend

pytest_plugins = "pytester"


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
    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(source, target, pairs.flip(1))


class CopiesOneLayer(DenseBackend):
    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(source[:, :1], target[:, :1], pairs)


class CopiesWithinTheTarget(DenseBackend):
    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(target, target, pairs % len(target))


class CopiesWithinTheSource(DenseBackend):
    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(source, source, pairs % len(source))


class CountsTheBlocksOfOneTier(DenseBackend):
    """Skips ids that are out of range there."""

    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(source, target, pairs[(pairs < len(source)).all(1)])


class CountsTheBlocksOfTheTarget(DenseBackend):
    def copy_blocks(self, source, target, pairs):
        super().copy_blocks(source, target, pairs[(pairs < len(target)).all(1)])


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


BROKEN = [broken for broken in DenseBackend.__subclasses__() if broken.__module__ == __name__]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_broken_backends_are_caught(broken: type[DenseBackend]) -> None:
    assert is_caught(broken())


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
