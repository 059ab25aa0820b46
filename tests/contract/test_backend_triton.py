"""The Triton backend: the conformance suite and what it leaves out, on a GPU; a part of it on the CPU, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagemgr.backends import AttentionParams, KVLayer
from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import ConformanceSuite
from pagemgr.backends.interface import LARGEST
from pagemgr.backends.reference import TorchBackend
from pagemgr.backends.triton.backend import TritonBackend
from pagemgr.batch import PagedBatch


@pytest.mark.gpu
class TestTriton(ConformanceSuite):
    backend = TritonBackend
    device = "cuda"


@pytest.mark.gpu
class TestTritonOtherInputs(ConformanceSuite):
    backend = TritonBackend
    device = "cuda"
    seed = 20261124


triton = pytest.importorskip("triton", reason="triton is not installed")
PARAMS = AttentionParams()

# (query heads, K/V heads, head dim, block size)
SHAPES = [(32, 8, 128, 16), (8, 8, 64, 32), (12, 4, 80, 16), (5, 1, 256, 64), (64, 8, 128, 128), (6, 2, 96, 8)]


def ragged(lens: list[int], news: list[int], heads: int, kv_heads: int, dim: int, size: int, seed: int):
    """A batch in float64, in a pool that holds NaN wherever no token of it is."""
    generator = torch.Generator("cuda").manual_seed(seed)
    counts = [-(-n // size) for n in lens]
    ids = 1 + torch.randperm(sum(counts), generator=generator, device="cuda", dtype=torch.int32)
    pool = torch.full((sum(counts) + 1, 2, kv_heads, size, dim), torch.nan, dtype=torch.float64, device="cuda")
    table = torch.zeros(len(lens), max(counts) + 1, dtype=torch.int32, device="cuda")
    for row, (n, blocks) in enumerate(zip(lens, torch.split(ids, counts), strict=True)):
        table[row, : len(blocks)] = blocks
        places = torch.arange(n, device="cuda")
        tokens = torch.randn(2, n, kv_heads, dim, generator=generator, device="cuda", dtype=torch.float64)
        pool[blocks[places // size].long(), :, :, places % size] = tokens.transpose(0, 1).bfloat16().double()
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    batch = PagedBatch(
        block_table=table,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device="cuda"),
        query_start=starts,
        slot_mapping=torch.full((sum(news),), -1, device="cuda"),
        max_query_len=max(news),
        max_seq_len=max(lens),
    )
    query = torch.randn(sum(news), heads, dim, generator=generator, device="cuda", dtype=torch.float64)
    return query.bfloat16().double(), pool, batch


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["decode", "few", "prefill", "mixed"])
@pytest.mark.parametrize("window", [None, 300])
def test_long_ragged_batches(kind: str, shape: tuple[int, int, int, int], seed: int, window: int | None) -> None:
    """Far more keys than the conformance suite's cases have: shares, parts and many tiles, in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    lens = (torch.rand(19, generator=draw) ** 3 * 6000).int().add(1).tolist()
    most = {"decode": 1, "few": 4, "prefill": 700, "mixed": 700}[kind]
    news = [min(n, int(torch.randint(1, most + 1, (), generator=draw))) for n in lens]
    if kind == "mixed":
        news[::2] = [1] * len(news[::2])
    query, pool, batch = ragged(lens, news, *shape, seed)
    params = AttentionParams(window=window)
    expected_lse = torch.empty(query.shape[:2], device="cuda")
    expected = TorchBackend().attention(query, KVLayer(pool[:, 0], pool[:, 1]), batch, params, lse=expected_lse)
    half = pool.bfloat16()
    out = torch.full(query.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = torch.full(query.shape[:2], torch.nan, device="cuda")
    TritonBackend().attention(query.bfloat16(), KVLayer(half[:, 0], half[:, 1]), batch, params, out, lse)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 5e-3, f"relative error {error}"
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-3)


# head dim, and (tokens, new tokens) of each sequence
LONG = {
    "widened-once": (128, [(700, 700)] * 3),
    "widened-once-and-cut": (96, [(9000, 150)]),
    "widened-by-every-tile": (256, [(900, 400), (50, 1), (333, 333)]),
    "few-tiles": (64, [(800, 70)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("stored", LARGEST, ids=str)
def test_long_queries_of_quantised_keys(kind: str, window: int | None, stored: torch.dtype) -> None:
    dim, seqs = LONG[kind]
    lens, news = zip(*seqs, strict=True)
    query, pool, batch = ragged(list(lens), list(news), 8, 2, dim, 16, seed=dim)
    scales = (torch.rand(pool.shape[:-1], device="cuda") * 4 - 6).exp2()
    rows = (pool / scales.double().unsqueeze(-1)).clamp(-LARGEST[stored], LARGEST[stored])
    rows = (rows.nan_to_num(LARGEST[stored]) if stored is torch.int8 else rows).float().to(stored)
    exact = rows.double() * scales.double().unsqueeze(-1)
    params = AttentionParams(window=window)
    expected_lse = torch.empty(query.shape[:2], device="cuda")
    expected = TorchBackend().attention(query, KVLayer(exact[:, 0], exact[:, 1]), batch, params, lse=expected_lse)
    out = torch.full(query.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = torch.full(query.shape[:2], torch.nan, device="cuda")
    kv = KVLayer(rows[:, 0], rows[:, 1], scales[:, 0], scales[:, 1])
    TritonBackend().attention(query.bfloat16(), kv, batch, params, out, lse)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 5e-3, f"relative error {error}"
    torch.testing.assert_close(lse, expected_lse, atol=5e-3, rtol=1e-3)


# (query heads, K/V heads, new tokens, sequences): 16 rows by few and many items and by one head, then 32 and 64 rows
FORMS = [(8, 2, 1, 3), (16, 16, 1, 32), (2, 2, 1, 3), (8, 2, 8, 3), (8, 2, 16, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_form_of_decode(dtype: torch.dtype, dim: int, form: tuple[int, int, int, int]) -> None:
    """Tile sizes depend on all of these; each is another compiled kernel."""
    heads, kv_heads, new, rows = form
    lens = [30 + 53 * row % 400 for row in range(rows)]
    query, pool, batch = ragged(lens, [new] * rows, heads, kv_heads, dim, 16, seed=dim)
    expected = TorchBackend().attention(query, KVLayer(pool[:, 0], pool[:, 1]), batch, PARAMS)
    kv = KVLayer(pool[:, 0].to(dtype), pool[:, 1].to(dtype))
    out = TritonBackend().attention(query.to(dtype), kv, batch, PARAMS)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5}.get(dtype, 5e-3), f"relative error {error}"


@pytest.mark.gpu
def test_a_captured_graph_serves_any_lengths_within_it() -> None:
    lens = [4000, 1, 17, 2048, 900, 3]
    query, pool, batch = ragged(lens, [1] * 6, 32, 8, 128, 16, seed=5)
    kv, half = KVLayer(pool[:, 0], pool[:, 1]), pool.bfloat16()
    backend, half_query, out = TritonBackend(), query.bfloat16(), torch.empty_like(query, dtype=torch.bfloat16)

    def launch() -> None:
        backend.attention(half_query, KVLayer(half[:, 0], half[:, 1]), batch, AttentionParams(), out)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for cut in (lens, [1, 1, 1, 1, 1, 1], [3999, 0, 16, 33, 640, 2], [0] * 6):
        batch.seq_lens.copy_(torch.tensor(cut))
        out.fill_(torch.nan)
        graph.replay()
        expected = TorchBackend().attention(query, kv, batch, AttentionParams())
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 255, 5000])
def test_write_reaches_every_slot_and_no_other(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    pool = torch.full((700, 2, 8, 16, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    expected = pool.clone()
    slots = torch.randperm(700 * 16, generator=generator, device="cuda")[:tokens]
    new = torch.randn(tokens, 2, 8, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    for kv, backend in ((pool, TritonBackend()), (expected, TorchBackend())):
        backend.write_kv(new[:, 0], new[:, 1], KVLayer(kv[:, 0], kv[:, 1]), slots)
    assert torch.equal(pool.view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu
def test_blocks_beyond_two_to_the_31_elements() -> None:
    """Offsets are 64 bits wide."""
    pool = torch.empty(2**15 + 9, 2, 8, 64, 128, dtype=torch.bfloat16, device="cuda")  # 4.3e9 elements
    case = Case(torch.bfloat16, head_dim=128, block_size=64, group_size=4, kv_heads=8, seqs=((130, 1), (64, 64)))
    problem = build(case, torch.Generator().manual_seed(3), "cuda")
    shift = len(pool) - len(problem.pool)
    pool[shift:] = torch.stack((problem.kv.key, problem.kv.value), 1)
    batch = replace(problem.batch, block_table=problem.batch.block_table + shift)
    out = TritonBackend().attention(problem.query, KVLayer(pool[:, 0], pool[:, 1]), batch, problem.params)
    torch.testing.assert_close(out.cpu().double(), problem.expected()[0], atol=2e-2, rtol=2e-2)
    TritonBackend().copy_blocks(pool, pool, torch.tensor([[len(pool) - 1, 3], [len(pool) - 2, 2]], device="cuda"))
    assert torch.equal(pool[[3, 2]].view(torch.int16), pool[[-1, -2]].view(torch.int16))


@pytest.mark.gpu
def test_tensors_at_odd_addresses() -> None:
    """Neither the form compiled for aligned tensors nor its loads are used for them."""
    query, pool, batch = ragged([100, 37], [1, 1], 8, 2, 64, 16, seed=9)
    half, expected = pool.bfloat16(), TorchBackend().attention(query, KVLayer(pool[:, 0], pool[:, 1]), batch, PARAMS)
    kv, backend = KVLayer(half[:, 0], half[:, 1]), TritonBackend()
    for shift in (0, 1, 4, 0):
        wide = torch.empty(query.numel() + shift, dtype=torch.bfloat16, device="cuda")
        shifted = wide[shift:].view(query.shape).copy_(query)
        out = backend.attention(shifted, kv, batch, PARAMS)
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_nothing_is_compiled_when_only_lengths_change(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def note(**event: object) -> None:
        compiled.append(event["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    backend, draw = TritonBackend(), torch.Generator().manual_seed(4)
    counts = []
    for run in range(12):
        rows = int(torch.randint(2, 30, (), generator=draw))
        lens = torch.randint(1, 900, (rows,), generator=draw).tolist()
        for news in ([1] * rows, [1] * (rows - 1) + [min(300, lens[-1])], [min(n, 200) for n in lens]):
            lens[-1] = max(lens[-1], 100 + run)
            query, pool, batch = (part for part in ragged(lens, news, 12, 3, 32, 16, seed=run))
            kv = KVLayer(pool[:, 0].half(), pool[:, 1].half())
            backend.attention(query.half(), kv, batch, AttentionParams(window=50 + run))
            new = torch.zeros(len(query), 3, 32, dtype=torch.float16, device="cuda")
            backend.write_kv(new, new, kv, batch.slot_mapping)
            backend.copy_blocks(kv.key, kv.key, torch.arange(2, device="cuda").view(1, 2))
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[-1] == counts[0], compiled[counts[0] :]


@pytest.mark.gpu
def test_a_compiled_step_has_no_graph_breaks() -> None:
    query, pool, batch = ragged([40, 7, 100], [1, 1, 60], 8, 2, 64, 16, seed=2)
    half, backend = pool.bfloat16(), TritonBackend()
    new = torch.randn(batch.num_tokens, 2, 64, device="cuda", dtype=torch.bfloat16)
    lse = torch.empty(query.shape[:2], device="cuda")

    def step(query: torch.Tensor, new: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv = KVLayer(pool[:, 0], pool[:, 1])
        backend.write_kv(new, new, kv, batch.slot_mapping)
        out = backend.attention(query, kv, batch, PARAMS, lse=lse)
        return backend.merge([out, out * 2], [lse, lse + 1])

    expected = step(query.bfloat16(), new, half)
    found = torch.compile(step, fullgraph=True)(query.bfloat16(), new, half)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_operations_pass_torchs_own_checks() -> None:
    from pagemgr.backends.triton import library

    query, pool, batch = ragged([40, 7], [1, 1], 8, 2, 64, 16, seed=3)
    kv = KVLayer(*(part.half() for part in pool.unbind(1)))
    new, lse = torch.randn(2, 2, 64, device="cuda").half(), torch.randn(2, 8, device="cuda")
    tables = (batch.block_table, batch.seq_lens, batch.query_start, batch.slot_mapping)
    half, out = query.half(), torch.empty_like(query, dtype=torch.float16)
    for operation, arguments in (
        (library.write_kv, (new, new + 1, kv.key, kv.value, None, None, torch.tensor([3, -1], device="cuda"))),
        (library.copy_blocks, (kv.key, kv.key.clone(), torch.tensor([[1, 2]], device="cuda"))),
        (library.merge, ([half, half + 1], [lse, lse + 1])),
        (
            library.attention,
            (half, kv.key, kv.value, None, None, *tables, 1, 40, None, True, None, None, None, None, out, lse.clone()),
        ),
    ):
        torch.library.opcheck(operation, arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_interpreted(root: Path) -> None:
    """The kernels' logic on the CPU: tiny, because the interpreter is slow. It says nothing of races or speed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract/triton_interpreted.py"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
