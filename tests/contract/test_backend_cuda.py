"""The CUDA library on a GPU: the conformance suite twice, and random batches too large for its oracle."""

from __future__ import annotations

import random

import pytest
import torch

from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import ConformanceSuite
from pagemgr.backends.cuda import CudaBackend
from pagemgr.backends.reference import TorchBackend

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
    )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_batches_agree_with_the_reference(seed: int) -> None:
    case = random_case(seed)
    problem = build(case, torch.Generator().manual_seed(seed), "cuda")
    results = []
    for backend in (CudaBackend(), TorchBackend()):
        out = torch.full(problem.query.shape, torch.nan, dtype=case.dtype, device="cuda")
        lse = torch.full(out.shape[:2], torch.nan, device="cuda")
        backend.attention(problem.query, problem.kv, problem.batch, problem.params, out=out, lse=lse)
        results.append((out.float(), lse))
    (out, lse), (expected_out, expected_lse) = results
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=2e-3)
    assert float((out - expected_out).norm()) <= 1e-2 * float(expected_out.norm()) + 1e-6, case
