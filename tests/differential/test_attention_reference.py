"""The torch backend against the oracle on drawn cases, and against itself: chunk by chunk, step by step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from pagemgr.backends import AttentionParams, KVLayer, reference
from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import LSE_TOLERANCE, TOLERANCE
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch

BACKEND = TorchBackend()


def draw_case(rng: random.Random) -> Case:
    """Anything that the interface allows, small."""
    lens = [rng.choice([0, 1, 2, rng.randrange(1, 70)]) for _ in range(rng.randrange(6))]
    new = [rng.choice([1, n, rng.randint(0, n)]) for n in lens]
    return Case(
        dtype=rng.choice(list(TOLERANCE)),
        head_dim=rng.choice([1, 3, 16, 80]),
        block_size=rng.choice([1, 2, 7, 16]),
        group_size=rng.randrange(1, 6),
        kv_heads=rng.randrange(1, 4),
        seqs=tuple(zip(lens, new, strict=True)),
        padding=rng.choice([0, 0, 4]),
        causal=rng.random() < 0.7,
        window=rng.choice([None, None, 1, rng.randrange(1, 80)]),
        softcap=rng.choice([None, 0.8, 30.0]),
        scale=rng.choice([None, 0.2]),
        alibi=rng.random() < 0.3,
        sinks=rng.random() < 0.3,
        poison=rng.choice([torch.nan, torch.inf, -torch.inf]),
    )


@pytest.mark.parametrize("seed", range(150))
def test_drawn_cases_agree_with_the_oracle(seed: int) -> None:
    case = draw_case(random.Random(seed))
    problem = build(case, torch.Generator().manual_seed(seed), "cpu")
    lse = torch.full(problem.query.shape[:2], torch.nan)
    out = BACKEND.attention(problem.query, problem.kv, problem.batch, problem.params, lse=lse)
    expected_out, expected_lse = problem.expected()
    bounds = ((out, expected_out, TOLERANCE[case.dtype]), (lse, expected_lse, LSE_TOLERANCE[case.dtype]))
    for actual, expected, tolerance in bounds:
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_query_chunks_does_not_show(
    monkeypatch: pytest.MonkeyPatch, chunk: int, window: int | None, causal: bool
) -> None:
    case = Case(torch.float64, 16, 4, 2, seqs=((9, 9), (20, 7), (0, 3), (64, 64)), causal=causal, window=window)
    problem = build(replace(case, with_lse=True), torch.Generator().manual_seed(chunk), "cpu")
    call = (problem.query, problem.kv, problem.batch, problem.params)
    whole, by_chunks = (torch.empty(problem.query.shape[:2]) for _ in range(2))
    expected = BACKEND.attention(*call, lse=whole)
    monkeypatch.setattr(reference, "QUERY_CHUNK", chunk)
    torch.testing.assert_close(BACKEND.attention(*call, lse=by_chunks), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(by_chunks, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("params", [AttentionParams(), AttentionParams(window=6, softcap=2.0)], ids=["plain", "gemma"])
def test_tokens_written_one_at_a_time_see_what_a_prompt_sees(params: AttentionParams) -> None:
    """Prefill in one call, or decode every token of the same sequence after writing it: the same outputs."""
    length, heads, kv_heads, dim, size = 23, 4, 2, 8, 5
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(length, heads, dim, generator=generator)
    key, value = torch.randn(2, length, kv_heads, dim, generator=generator)
    table = torch.tensor([[4, 2, 7, 1, 6, 0]], dtype=torch.int32)
    slots = torch.tensor([int(table[0, token // size]) * size + token % size for token in range(length)])

    def run(pool: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        kv = KVLayer(pool[:, 0], pool[:, 1])
        batch = PagedBatch(
            block_table=table,
            seq_lens=torch.tensor([stop], dtype=torch.int32),
            query_start=torch.tensor([0, stop - first], dtype=torch.int32),
            slot_mapping=slots[first:stop],
            max_query_len=stop - first,
            max_seq_len=stop,
        )
        BACKEND.write_kv(key[first:stop], value[first:stop], kv, batch.slot_mapping)
        return BACKEND.attention(query[first:stop], kv, batch, params)

    pools = [torch.full((8, 2, kv_heads, size, dim), torch.nan) for _ in range(3)]
    whole = run(pools[0], 0, length)
    stepwise = torch.cat([run(pools[1], token, token + 1) for token in range(length)])
    chunked = torch.cat([run(pools[2], first, min(first + 7, length)) for first in range(0, length, 7)])
    torch.testing.assert_close(stepwise, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(pool.view(torch.int32), pools[0].view(torch.int32)) for pool in pools)
