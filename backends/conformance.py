"""The suite that every backend has to pass; run it on yours with pytest:

    # tests/test_my_backend.py
    from my_package.backend import MyBackend
    from pagemgr.backends.conformance import ConformanceSuite

    class TestMyBackend(ConformanceSuite):
        backend = MyBackend
        device = "cuda"          # where the tensors live; "cpu" if left out
        seed = 7                 # another seed, other inputs

It tests what ``MyBackend().capabilities()`` declares, and that the rest is refused. If ``MyBackend.probe()`` says that
it cannot run, or torch has no such device, all is skipped, with the reason. Each check has a name that states its case,
so ``pytest -k alibi`` selects; ``for check in checks(MyBackend(), "cuda"): check.run()`` does the same by hand.

Results are compared with ``oracle.dense_attention`` (float64) within ``TOLERANCE``, bytes with ``==``. Every slot that
must not be read is NaN or infinite, or its scale is, block tables are shuffled, layers are strided views of a
block-major pool.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from pagemgr.errors import UnsupportedFeature

from .cases import Case, Problem, attention_cases, base_case, build, refused_layouts, refused_queries
from .interface import LARGEST, LEAST_SCALE, AttentionParams, Backend, Feature, KVLayer
from .oracle import dense_attention

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Absolute and relative, of outputs, by dtype of the pool."""

LSE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Absolute and relative, of log denominators, which are float32 always."""


@dataclass(frozen=True, slots=True)
class Check:
    """One named claim about a backend."""

    name: str
    verify: Callable[[torch.Generator], None]
    seed: int

    def run(self) -> None:
        """Raise ``AssertionError`` if the claim does not hold; the same inputs each time."""
        self.verify(torch.Generator().manual_seed(self.seed))


class ConformanceSuite:
    """Subclass it in a test module as ``Test…``; see the top of this module."""

    backend: ClassVar[type[Backend]]
    device: ClassVar[str] = "cpu"
    seed: ClassVar[int] = 0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per check."""
        reason = self.backend.probe() or _no_device(self.device)
        if reason is None:
            found = [pytest.param(check, id=check.name) for check in checks(self.backend(), self.device, self.seed)]
        else:
            found = [pytest.param(None, id="unavailable", marks=pytest.mark.skip(reason=reason))]
        metafunc.parametrize("check", found)

    def test_conforms(self, check: Check) -> None:
        """Run one check."""
        check.run()


def _no_device(device: str) -> str | None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"torch has no device {device!r} here: {error}"
    return None


def checks(backend: Backend, device: str, seed: int = 0) -> list[Check]:
    """Everything that the backend has to satisfy on this device, given what it declares."""
    return [
        Check(name, partial(verify, backend, device), seed ^ zlib.crc32(name.encode()))
        for name, verify in _claims(backend, torch.device(device).type)
    ]


def _claims(
    backend: Backend, device_type: str
) -> Iterator[tuple[str, Callable[[Backend, str, torch.Generator], None]]]:
    capabilities = backend.capabilities()
    base = base_case(capabilities)
    yield "declares-device", _declares_device
    for dtype in sorted(capabilities.dtypes, key=str):
        for verb, verify in (("write_kv", _writes), ("copy_blocks", _copies), ("merge", _merges)):
            yield f"{verb}-{dtype}", partial(verify, replace(base, dtype=dtype))
        yield f"copy_blocks-between-tiers-{dtype}", partial(_moves, replace(base, dtype=dtype))
        for kv_dtype in sorted(capabilities.kv_dtypes, key=str):
            case = replace(base, dtype=dtype, kv_dtype=kv_dtype)
            yield f"write_kv-{dtype}-as-{kv_dtype}", partial(_quantises, case)
            yield f"write_kv-{dtype}-as-{kv_dtype}-not-finite", partial(_quantises_not_finite, case)
    yield "write_kv-nothing", partial(_writes_nothing, base)
    for name, case in attention_cases(capabilities):
        yield f"attention-{name}", partial(_attends, case)
    yield "attention-makes-out", partial(_makes_out, base)
    if capabilities.features >= {Feature.non_causal, Feature.causal, Feature.lse}:
        yield "merge-of-shared-prefix", partial(_cascades, base)
    for name, case in refused_layouts(capabilities):
        yield f"write_kv-refuses-{name}", partial(_refuses_write, case)
        yield f"attention-refuses-{name}", partial(_refuses, case)
    for name, case in refused_queries(capabilities):
        yield f"attention-refuses-{name}", partial(_refuses, case)
    if capabilities.graph_capture and device_type == "cuda":
        yield "graph-capture", partial(_captures, base)


def _declares_device(backend: Backend, device: str, generator: torch.Generator) -> None:
    declared = backend.capabilities().devices
    if declared is not None and torch.device(device).type not in declared:
        raise AssertionError(f"tested on {device}, but only {sorted(declared)} are declared")


def _attends(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    out = torch.full_like(problem.query, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full(out.shape[:2], torch.nan, device=device) if case.with_lse else None
    untouched = problem.pool.clone()
    returned = backend.attention(problem.query, problem.kv, problem.batch, problem.params, out=out, lse=lse)
    if returned.data_ptr() != out.data_ptr():
        raise AssertionError("attention returned another tensor than the given out")
    _compare(problem, out, lse)
    _same_bytes(problem.pool, untouched, "the pool, which attention only reads,")


def _makes_out(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    out = backend.attention(problem.query, problem.kv, problem.batch, problem.params)
    made, wanted = (out.dtype, out.shape), (problem.query.dtype, problem.query.shape)
    if made != wanted:
        raise AssertionError(f"attention made an out of {made} for a query of {wanted}")
    _compare(problem, out, None)


def _compare(problem: Problem, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    expected_out, expected_lse = problem.expected()
    dtype = problem.query.dtype
    _close(out, expected_out, TOLERANCE[dtype], "out")
    if lse is not None:
        _close(lse, expected_lse, LSE_TOLERANCE[dtype], "lse")


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(
        actual.cpu().double(), expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def _same_bytes(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    same = actual.view(torch.uint8) == expected.view(torch.uint8)
    if not bool(same.all()):
        where = (~same).nonzero()[0].tolist()
        raise AssertionError(f"{name} has other bytes than expected: {int((~same).sum())}, the first at {where}")


def _writes(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    pool = problem.pool
    slots = _slots(case, len(pool), generator)
    tokens = torch.randn(len(slots), 3, case.kv_heads, case.head_dim, generator=generator).to(device, case.dtype)
    key, value = tokens[:, 0], tokens[:, 2]  # strided, as slices of a fused projection are
    expected = replace(problem, pool=pool.clone())
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, case.block_size)
            expected.kv.key[block, :, offset] = key[token]
            expected.kv.value[block, :, offset] = value[token]
    backend.write_kv(key, value, problem.kv, slots.to(device))
    _same_bytes(pool, expected.pool, "the pool after write_kv")


def _slots(case: Case, num_blocks: int, generator: torch.Generator) -> torch.Tensor:
    """Slots all over the pool, some of them -1."""
    count = 4 * case.block_size + 3
    slots = torch.randperm(num_blocks * case.block_size, generator=generator)[:count]
    slots[torch.rand(count, generator=generator) < 0.2] = -1
    slots[[0, -1]] = -1
    return slots


def _quantises(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """Scales are those that ``write_kv`` promises, elements the nearest ones, and nothing else changed.

    Rows have magnitudes of their own; one of three is 0, one too small for a scale.
    """
    problem = build(case, generator, device)
    slots = _slots(case, len(problem.pool), generator)
    written = slots >= 0
    rows = torch.randn(len(slots), 2, case.kv_heads, case.head_dim, generator=generator)
    rows *= 10 ** (6 * torch.rand(rows.shape[:3], generator=generator) - 3).unsqueeze(-1)
    rows[written.nonzero()[::3], 0] = 0
    rows[written.nonzero()[1::3], 1] = 1e-39
    rows = rows.to(device, case.dtype)
    before = replace(problem, pool=problem.pool.clone())
    backend.write_kv(rows[:, 0], rows[:, 1], problem.kv, slots.to(device))
    blocks, offsets = (
        part.to(device) for part in (slots[written] // case.block_size, slots[written] % case.block_size)
    )
    for i, name in enumerate(("key", "value")):
        (stored, scales), (old, old_scales) = _parts(problem.kv, name), _parts(before.kv, name)
        _nearest(rows[written.to(device), i], stored[blocks, :, offsets], scales[blocks, :, offsets], name)
        old[blocks, :, offsets], old_scales[blocks, :, offsets] = stored[blocks, :, offsets], scales[blocks, :, offsets]
    _same_bytes(problem.pool, before.pool, "the pool after write_kv, but for the slots,")


def _quantises_not_finite(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """Rows with one element that is no number, or nothing else, are NaN throughout, and their neighbours untouched."""
    problem = build(case, generator, device)
    rows = torch.randn(12, case.kv_heads, case.head_dim, generator=generator)
    places = (slice(1), slice(-1, None), slice(None))
    for row, (found, where) in enumerate(itertools.product((torch.nan, torch.inf, -torch.inf), places)):
        rows[row, row % case.kv_heads, where] = found
    finite = rows.isfinite().all(-1)
    slots = torch.randperm(len(problem.pool) * case.block_size, generator=generator)[: len(rows)]
    rows = rows.to(device, case.dtype)
    backend.write_kv(rows, -rows, problem.kv, slots.to(device))
    blocks, offsets = ((slots // case.block_size).to(device), (slots % case.block_size).to(device))
    for sign, name in ((1, "key"), (-1, "value")):
        stored, scales = (part[blocks, :, offsets].cpu() for part in _parts(problem.kv, name))
        _nearest(sign * rows.cpu()[finite], stored[finite], scales[finite], name)
        held = stored[~finite].float() * scales[~finite].unsqueeze(-1)
        if bool(scales[~finite].isfinite().any()) or not bool(held.isnan().all()):
            raise AssertionError(f"rows of the {name} that are not finite were stored as {held} by {scales[~finite]}")


def _parts(kv: KVLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(kv, name), getattr(kv, f"{name}_scale")


def _nearest(rows: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    exact = rows.cpu().double()
    wanted = exact.abs().amax(-1) / LARGEST[stored.dtype]
    wanted = wanted.masked_fill(wanted < LEAST_SCALE, 0)
    torch.testing.assert_close(
        scales.cpu().double(), wanted, atol=0, rtol=1e-6, msg=lambda text: f"scales of the {name}: {text}"
    )
    ratio = exact / scales.cpu().double().masked_fill(scales.cpu() == 0, torch.inf).unsqueeze(-1)
    half_step = torch.full_like(ratio, 0.5)
    if stored.dtype.is_floating_point:
        info = torch.finfo(stored.dtype)
        half_step = ratio.abs().clamp(min=info.tiny) * info.eps / 2
    off = (stored.cpu().double() - ratio).abs()
    if bool((off > half_step * (1 + 1e-5)).any()) or bool(off.isnan().any()):
        raise AssertionError(
            f"elements of the {name} are not the nearest: off by {float((off / half_step).max())} halves"
        )


def _writes_nothing(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    expected = problem.pool.clone()
    for count in (0, 3):
        key = torch.randn(count, case.kv_heads, case.head_dim, generator=generator).to(device, case.dtype)
        backend.write_kv(key, key, problem.kv, torch.full((count,), -1, dtype=torch.int64, device=device))
        _same_bytes(problem.pool, expected, "the pool after writing no token")


def _copies(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    order = torch.randperm(len(problem.pool), generator=generator)
    for count in (0, 1, len(order) // 2):
        pairs = order[: 2 * count].view(-1, 2)
        expected = problem.pool.clone()
        for source, target in pairs.tolist():
            expected[target] = problem.pool[source]
        backend.copy_blocks(problem.pool, problem.pool, pairs.to(device))
        _same_bytes(problem.pool, expected, f"the pool after copying {count} blocks")


def _moves(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """Out to a tier in host memory, pinned for a GPU, and back; one of the two has more blocks, either in turn."""
    pool = build(case, generator, device).pool
    for blocks in (3 * len(pool), 1 + len(pool) // 2):
        host = torch.zeros((blocks, *pool.shape[1:]), dtype=pool.dtype, pin_memory=torch.device(device).type == "cuda")
        for source, target in ((pool, host), (host, pool)):
            count = min(len(source), len(target))
            ids = [len(tier) - 1 - torch.randperm(count, generator=generator) for tier in (source, target)]
            pairs = torch.stack(ids, 1)
            for some in (pairs[:0], pairs):
                before, expected = source.clone(), target.clone()
                expected[some[:, 1].to(target.device)] = source[some[:, 0].to(source.device)].to(target.device)
                backend.copy_blocks(source, target, some.to(device))
                if device != "cpu":
                    torch.accelerator.synchronize()
                _same_bytes(source, before, "the tier that was read from")
                _same_bytes(target, expected, f"the tier that {len(some)} blocks went to")


def _merges(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """Parts come from the oracle, so that this needs nothing else of the backend; some of them saw no key.

    One constant added to all logits changes no output; it overflows whoever does not subtract the largest.
    """
    params = AttentionParams(causal=False)
    query = torch.randn(9, case.heads, case.head_dim, generator=generator)
    key, value = torch.randn(2, 40, case.kv_heads, case.head_dim, generator=generator)
    for cuts, shift in itertools.product(((0, 40), (0, 17, 40), (0, 0, 1, 30, 40), (0, 0, 0)), (0, 200, -200)):
        bounds = itertools.pairwise(cuts)
        parts = [dense_attention(query, key[start:stop], value[start:stop], params) for start, stop in bounds]
        outs = [out.masked_fill(lse.isinf().unsqueeze(-1), torch.nan).to(device, case.dtype) for out, lse in parts]
        lses = [(lse + shift).to(device, torch.float32) for _, lse in parts]
        out, lse = backend.merge(outs, lses)
        if (out.dtype, lse.dtype) != (case.dtype, torch.float32):
            raise AssertionError(f"merge of {case.dtype} and float32 gave {out.dtype} and {lse.dtype}")
        whole_out, whole_lse = dense_attention(query, key[: cuts[-1]], value[: cuts[-1]], params)
        name = f"merged at {cuts}, logits {shift:+}"
        _close(out, whole_out, max(TOLERANCE[case.dtype], 1e-4), f"out {name}")  # no better than its float32 weights
        _close(lse, whole_lse + shift, LSE_TOLERANCE[case.dtype], f"lse {name}")


def _cascades(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """A prefix of whole blocks attended without mask, the rest causally, merged: what one call over both gives."""
    size = case.block_size
    problem = build(replace(case, seqs=((3 * size + 5, 4), (2 * size, 1), (5 * size - 1, size))), generator, device)
    batch, causal = problem.batch, problem.params
    lses = [torch.full(problem.query.shape[:2], torch.nan, device=device) for _ in range(2)]
    prefix = replace(batch, seq_lens=torch.full_like(batch.seq_lens, size))
    suffix = replace(batch, seq_lens=batch.seq_lens - size, block_table=batch.block_table[:, 1:].contiguous())
    outs = [
        backend.attention(problem.query, problem.kv, prefix, replace(causal, causal=False), lse=lses[0]),
        backend.attention(problem.query, problem.kv, suffix, causal, lse=lses[1]),
    ]
    out, lse = backend.merge(outs, lses)
    _compare(problem, out, lse)


def _refuses(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    out = torch.zeros_like(problem.query, memory_format=torch.contiguous_format)
    lse = torch.zeros(out.shape[:2], device=device) if case.with_lse else None
    _expect_refusal(partial(backend.attention, problem.query, problem.kv, problem.batch, problem.params, out, lse))
    if bool(out.any()) or (lse is not None and bool(lse.any())):
        raise AssertionError("attention wrote to out or lse before it refused")


def _refuses_write(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    problem = build(case, generator, device)
    untouched = problem.pool.clone()
    token = torch.randn(1, case.kv_heads, case.head_dim, generator=generator).to(device, case.dtype)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    _expect_refusal(partial(backend.write_kv, token, token, problem.kv, slot))
    _same_bytes(problem.pool, untouched, "the pool after a refused write_kv")


def _expect_refusal(call: Callable[[], object]) -> None:
    try:
        call()
    except UnsupportedFeature as error:
        if not error.reasons:
            raise AssertionError("UnsupportedFeature was raised without a reason") from error
    else:
        raise AssertionError("it ran, although capabilities() does not declare this")


def _captures(case: Case, backend: Backend, device: str, generator: torch.Generator) -> None:
    """Captured once at the largest lengths, replayed for shorter sequences with other tokens at the same addresses."""
    size = case.block_size
    problem = build(replace(case, seqs=((9 * size, 1),) * 4, with_lse=False), generator, device)
    batch, lens = problem.batch, (1, size, 0, 8 * size + 1)
    key, value = (torch.zeros(4, case.kv_heads, case.head_dim, dtype=case.dtype, device=device) for _ in range(2))
    out = torch.empty_like(problem.query, memory_format=torch.contiguous_format)

    def launch() -> None:
        backend.write_kv(key, value, problem.kv, batch.slot_mapping)
        backend.attention(problem.query, problem.kv, batch, problem.params, out=out)

    launch()  # what is compiled or loaded on first use is not part of a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for row, seq_len in enumerate(lens):
        block, offset = divmod(max(seq_len - 1, 0), size)
        batch.seq_lens[row] = seq_len
        batch.slot_mapping[row] = batch.block_table[row, block] * size + offset if seq_len else -1
        if seq_len:
            key[row], value[row] = problem.keys[row][seq_len - 1], problem.values[row][seq_len - 1]
            problem.kv.key[batch.block_table[row, block], :, offset] = torch.nan  # the graph has to write it
    problem.query.copy_(torch.randn(problem.query.shape, generator=generator))
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    _compare(problem, out, None)
