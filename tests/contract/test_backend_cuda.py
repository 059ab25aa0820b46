"""The CUDA library on a GPU: the conformance suite twice, and random batches too large for its oracle."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from pagemgr.backends import AttentionParams, KVLayer
from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import ConformanceSuite
from pagemgr.backends.cuda import CudaBackend
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch
from pagemgr.errors import InvalidInput

HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.mark.gpu
class TestCuda(ConformanceSuite):
    backend = CudaBackend
    device = "cuda"


@pytest.mark.gpu
class TestCudaOtherInputs(ConformanceSuite):
    backend = CudaBackend
    device = "cuda"
    seed = 20261124


def random_case(seed: int) -> Case:
    """Decodes, prompts and chunks of up to 600 tokens in one batch, with any features."""
    source = random.Random(seed)
    seqs = []
    for _ in range(source.choice((1, 2, 5, 40))):
        seq_len = source.choice((0, 1, source.randint(1, 20), source.randint(1, 600), source.randint(1, 600)))
        new = source.choice((1, 1, source.randint(1, 40), seq_len, source.randint(0, 3)))
        seqs.append((seq_len, min(new, seq_len or 2)))
    return Case(
        dtype=source.choice((torch.bfloat16, torch.float16)),
        head_dim=source.choice(HEAD_DIMS),
        block_size=source.choice((8, 16, 32, 64, 128)),
        group_size=source.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 32)),
        kv_heads=source.choice((1, 2, 3, 8)),
        seqs=tuple(seqs),
        padding=source.choice((0, 0, 3)),
        causal=source.random() < 0.75,
        window=source.choice((None, None, None, 1, source.randint(1, 300))),
        softcap=source.choice((None, None, None, 20.0, 1.5)),
        scale=source.choice((None, None, 0.3, -0.1)),
        alibi=source.random() < 0.2,
        sinks=source.random() < 0.2,
        with_lse=True,
        poison=source.choice((torch.nan, torch.inf)),
        kv_dtype=source.choice((None, torch.float8_e4m3fn)),
    )


def chunks_case(seed: int) -> Case:
    """A few chunks over long contexts: too few rows for all multiprocessors, so that their keys are cut."""
    source = random.Random(seed)
    seqs = [
        (source.randint(2000, 9000), source.choice((70, 130, source.randint(65, 300)))) for _ in range(seed % 3 + 1)
    ]
    return replace(
        random_case(seed),
        group_size=source.choice((1, 3, 4, 8)),
        kv_heads=source.choice((1, 2, 3)),
        seqs=(*seqs, (source.randint(1, 5000), 1)),
        window=source.choice((None, None, None, source.randint(1000, 3000))),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*map(random_case, range(100)), *map(chunks_case, range(24))])
def test_random_batches_agree_with_the_reference(case: Case) -> None:
    problem = build(case, torch.Generator().manual_seed(1), "cuda")
    results = []
    for backend in (CudaBackend(), TorchBackend()):
        out = torch.full(problem.query.shape, torch.nan, dtype=case.dtype, device="cuda")
        lse = torch.full(out.shape[:2], torch.nan, device="cuda")
        backend.attention(problem.query, problem.kv, problem.batch, problem.params, out=out, lse=lse)
        results.append((out.float(), lse))
    (out, lse), (expected_out, expected_lse) = results
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=2e-3)
    assert float((out - expected_out).norm()) <= 1e-2 * float(expected_out.norm()) + 1e-6, case


def batch_of(table: torch.Tensor, lens: list[int], news: list[int]) -> PagedBatch:
    starts = [0, *itertools.accumulate(news)]
    return PagedBatch(
        block_table=table,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device="cuda"),
        query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        slot_mapping=torch.full((starts[-1],), -1, device="cuda"),
        max_query_len=max(news),
        max_seq_len=max(lens),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("news", [(1,), (1, 3, 1, 200)])
def test_large_ragged_batches_and_replays_of_their_graph(news: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    lens = [int(n) for n in torch.randint(4000, 8192, (36,))]
    counts = [-(-n // 16) for n in lens]
    pool = torch.randn(1 + sum(counts), 2, 8, 16, 64, device="cuda", dtype=torch.bfloat16)
    ids = 1 + torch.randperm(sum(counts), device="cuda", dtype=torch.int32)
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32, device="cuda")
    for row, part in enumerate(torch.split(ids, counts)):
        table[row, : len(part)] = part
    batch = batch_of(table, lens, [news[row % len(news)] for row in range(len(lens))])
    kv, params = KVLayer(pool[:, 0], pool[:, 1]), AttentionParams()
    query = torch.randn(batch.num_tokens, 32, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(query, torch.nan)
    backend = CudaBackend()
    backend.attention(query, kv, batch, params, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.attention(query, kv, batch, params, out)
    expected = TorchBackend().attention(query, kv, batch, params).float()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert float((out.float() - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 300])
def test_pools_beyond_two_to_the_31_elements(new: int) -> None:
    layers, blocks = 64, 1100
    assert blocks * layers * 2 * 8 * 16 * 128 > 2**31
    pool = torch.empty(blocks, layers, 2, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
    kv = KVLayer(pool[:, -1, 0], pool[:, -1, 1])
    table = torch.arange(blocks - 1, blocks - 41, -1, device="cuda", dtype=torch.int32)[None]
    length = 40 * 16 - 3
    position = torch.arange(length, device="cuda")
    key, value = torch.randn(2, length, 8, 128, device="cuda", dtype=torch.bfloat16)
    backend, params = CudaBackend(), AttentionParams()
    backend.write_kv(key, value, kv, table[0].long()[position // 16] * 16 + position % 16)
    batch = batch_of(table, [length], [new])
    query = torch.randn(new, 32, 128, device="cuda", dtype=torch.bfloat16)
    small = KVLayer(kv.key[table[0].long()], kv.value[table[0].long()])
    at_home = batch_of(torch.arange(40, device="cuda", dtype=torch.int32)[None], [length], [new])
    for one in (key, value):
        kept = (small.key if one is key else small.value).transpose(1, 2).reshape(-1, 8, 128)[:length]
        assert torch.equal(kept, one)
    expected = TorchBackend().attention(query, small, at_home, params).float()
    out = backend.attention(query, kv, batch, params).float()
    assert float((out - expected).norm()) <= 1e-2 * float(expected.norm())
    backend.copy_blocks(pool, pool, torch.tensor([[blocks - 1, 0]], device="cuda"))
    assert torch.equal(pool[0, -1].view(torch.int16), pool[blocks - 1, -1].view(torch.int16))


@pytest.mark.gpu
def test_what_is_out_of_range_is_raised_once_by_a_later_call_or_when_asked() -> None:
    case = Case(torch.bfloat16, head_dim=64, block_size=16, group_size=2, seqs=((40, 1), (19, 3), (600, 200)))
    given = build(case, torch.Generator().manual_seed(1), "cuda")
    backend, kv, batch, params = CudaBackend(), given.kv, given.batch, given.params
    blocks, before = len(given.pool), given.pool.clone()
    tokens = torch.ones(1, *kv.key.shape[1::2], device="cuda", dtype=torch.bfloat16)

    def attend(**changes: torch.Tensor) -> torch.Tensor:
        return backend.attention(given.query, kv, replace(batch, **changes), params)

    def expect(found: str) -> None:
        torch.cuda.synchronize()
        with pytest.raises(InvalidInput, match=rf"in an earlier call, {found} \(device 0\): what was computed"):
            backend.raise_for_errors()
        backend.raise_for_errors()
        assert torch.equal(given.pool, before)

    expected = attend()
    for id_ in (-1, blocks, 2**31 - 1):
        for row in range(3):
            table = batch.block_table.clone()
            table[row, 0] = id_
            attend(block_table=table)
            expect("a block id is not in the pool")
    for length in (-3, 601):
        attend(seq_lens=torch.tensor([40, 19, length], dtype=torch.int32, device="cuda"))
        expect("a length is below 0 or above max_seq_len")
    for slot in (-2, blocks * 16, 2**62):
        backend.write_kv(tokens, tokens, kv, torch.tensor([slot], device="cuda"))
        expect("a slot is neither in the pool nor -1")
    for pair in ([1, blocks], [-1, 2]):
        backend.copy_blocks(given.pool, given.pool, torch.tensor([pair], device="cuda"))
        expect("a block id is not in the pool")
    graph = torch.cuda.CUDAGraph()
    slots = torch.tensor([-1], device="cuda")
    with torch.cuda.graph(graph):
        backend.write_kv(tokens, tokens, kv, slots)
    graph.replay()
    torch.cuda.synchronize()
    backend.raise_for_errors()
    slots.fill_(-5)
    for _ in range(2):
        graph.replay()
        expect("a slot is neither in the pool nor -1")
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(InvalidInput, match="a slot is neither"):
        attend()
    torch.testing.assert_close(attend(), expected, atol=2e-2, rtol=2e-2)
