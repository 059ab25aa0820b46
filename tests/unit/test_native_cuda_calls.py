"""What a native backend remembers between calls, on the CPU over a plain C library that implements the same header."""

from __future__ import annotations

import gc
import shutil
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch

from pagemgr.backends import AttentionParams, native
from pagemgr.backends.cases import Case, Problem, build
from pagemgr.backends.conformance import checks
from pagemgr.backends.cpu import CpuBackend
from pagemgr.backends.cuda import CudaBackend
from pagemgr.backends.library import NativeLibrary
from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import InvalidInput, UnsupportedFeature
from pagemgr.native.build import SOURCES

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> CudaBackend:
    path = tmp_path_factory.mktemp("own") / "libmine.so"
    source = Path(__file__).with_name("own_library.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", f"-I{SOURCES}", source, "-o", path, "-lm"], check=True)

    class OverOwnLibrary(CudaBackend):
        @classmethod
        def _load(cls) -> NativeLibrary:
            return NativeLibrary(cls.name, path, "compile it again")

    return OverOwnLibrary()


def problem(seed: int) -> Problem:
    case = Case(torch.float32, head_dim=64, block_size=16, group_size=2, seqs=((40, 1), (19, 19), (7, 1)))
    return build(case, torch.Generator().manual_seed(seed), "cpu")


def expect(backend: CudaBackend, given: Problem) -> None:
    wanted = TorchBackend().attention(given.query, given.kv, given.batch, given.params)
    torch.testing.assert_close(backend.attention(given.query, given.kv, given.batch, given.params), wanted)


def test_conforms(backend: CudaBackend) -> None:
    found = checks(backend, "cpu", seed=5)
    assert len(found) >= 50
    for check in found:
        check.run()


def test_calls_that_differ_in_pointers_alone_read_what_they_were_given(backend: CudaBackend) -> None:
    for seed in range(4):
        expect(backend, problem(seed))


@pytest.mark.parametrize("params", [AttentionParams(causal=False), AttentionParams(scale=0.4), AttentionParams()])
def test_other_parameters_are_other_calls(backend: CudaBackend, params: AttentionParams) -> None:
    expect(backend, replace(problem(11), params=params))


def test_lse_is_written_when_it_is_asked_for_only(backend: CudaBackend) -> None:
    given = problem(12)
    lse = torch.full(given.query.shape[:2], torch.nan)
    backend.attention(given.query, given.kv, given.batch, given.params, lse=lse)
    written = lse.clone()
    assert not written.isnan().any()
    lse.fill_(torch.nan)
    backend.attention(given.query, given.kv, given.batch, given.params)
    assert lse.isnan().all()


def test_what_does_not_fit_is_refused_after_a_call_that_did(backend: CudaBackend) -> None:
    given = problem(13)
    expect(backend, given)
    with pytest.raises(InvalidInput, match="out must have shape"):
        backend.attention(given.query, given.kv, given.batch, given.params, out=torch.empty(1, 4, 64))
    batch = replace(given.batch, seq_lens=given.batch.seq_lens.long())
    with pytest.raises(InvalidInput, match=r"seq_lens must be torch\.int32"):
        backend.attention(given.query, given.kv, batch, given.params)
    with pytest.raises(UnsupportedFeature, match="softcap"):
        backend.attention(given.query, given.kv, given.batch, AttentionParams(softcap=1.0))
    expect(backend, given)


def test_threads_share_no_struct(backend: CudaBackend) -> None:
    """Each thread has inputs of its own; the same signature for all."""
    given = [problem(20 + number) for number in range(4)]
    failures: list[BaseException] = []

    def work(mine: Problem) -> None:
        try:
            for _ in range(50):
                expect(backend, mine)
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=work, args=(mine,)) for mine in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_pool_is_kept_by_what_is_remembered(backend: CudaBackend) -> None:
    """Layers are known by their address, which the next layer may have: each is looked at, and none held."""
    for seed in range(6):
        given = problem(30 + seed)
        if seed % 2:
            given = replace(given, pool=torch.stack((given.pool, given.pool), 1)[:, 0])
        expect(backend, given)
        pool = weakref.ref(given.pool)
        del given
        gc.collect()
        assert pool() is None


def test_what_is_remembered_is_bounded(backend: CudaBackend) -> None:
    given = problem(14)
    for number in range(200):
        backend.attention(given.query, given.kv, given.batch, AttentionParams(scale=0.1 + number / 1000))
    assert len(backend._ready) <= 64


def test_writes_that_differ_in_pointers_alone_go_where_they_were_told(backend: CudaBackend) -> None:
    for seed in range(3):
        draw, given = torch.Generator().manual_seed(seed), problem(seed)
        expected = replace(given, pool=given.pool.clone())
        key, value = torch.randn(2, 5, 2, 64, generator=draw)
        slots = torch.randperm(32, generator=draw)[:5]
        backend.write_kv(key, value, given.kv, slots)
        TorchBackend().write_kv(key, value, expected.kv, slots)
        assert torch.equal(given.pool, expected.pool)
    with pytest.raises(InvalidInput, match=r"key must have shape \[4, 2, 64\]"):
        backend.write_kv(key, value, given.kv, slots[:4])


def test_what_kernels_noted_is_raised_by_a_later_call_once() -> None:
    """As on a GPU, where a call has not been done when it returns; the kernels here are those of the CPU."""
    if reason := CpuBackend.probe():
        pytest.skip(reason)
    backend, given = CpuBackend(), problem(18)
    backend._errors = native.ErrorWords(backend.library, torch.zeros(2, dtype=torch.int32))
    query, kv, batch, params = given.query, given.kv, given.batch, given.params
    expected = backend.attention(query, kv, batch, params)
    bad = replace(batch, block_table=batch.block_table.clone().fill_(10**6), seq_lens=batch.seq_lens + 100)
    backend.attention(query, kv, bad, params)
    with pytest.raises(
        InvalidInput, match=r"earlier call, a block id is not in the pool, a length .* \(device 0\): wh"
    ):
        backend.attention(query, kv, batch, params)
    backend.raise_for_errors()
    torch.testing.assert_close(backend.attention(query, kv, batch, params), expected)
    tokens = torch.ones(1, 2, 64)
    backend.write_kv(tokens, tokens, kv, torch.tensor([-2]))
    with pytest.raises(InvalidInput, match="a slot is neither in the pool nor -1"):
        backend.raise_for_errors()
    backend.copy_blocks(given.pool, given.pool, torch.tensor([[0, len(given.pool)]]))
    with pytest.raises(InvalidInput, match="a block id is not in the pool"):
        backend.merge([expected], [expected[..., 0].contiguous()])


def test_a_step_with_two_kinds_of_layers_is_checked_once_for_each(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, kinds = problem(15), (AttentionParams(), AttentionParams(scale=0.5))
    checked = []
    monkeypatch.setattr(native, "check_attention", lambda *args: checked.append(args))
    for layer in range(6):
        backend.attention(given.query, given.kv, given.batch, kinds[layer % 2])
    assert len(checked) == 2
    backend.attention(given.query, given.kv, replace(given.batch), kinds[0])
    assert len(checked) == 3
