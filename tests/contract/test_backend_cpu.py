"""The CPU library: every instruction set that this machine has passes the conformance suite, on several threads too."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import ConformanceSuite, checks
from pagemgr.backends.cpu import CpuBackend
from pagemgr.backends.interface import LARGEST
from pagemgr.backends.library import FUNCTIONS
from pagemgr.backends.native import NativeBackend
from pagemgr.errors import InvalidInput
from pagemgr.native.build import CPU_VARIANTS, cpu_recipe
from pagemgr.native.build import build as build_library

if reason := CpuBackend.probe():
    pytest.skip(reason, allow_module_level=True)


class TestCpu(ConformanceSuite):
    backend: ClassVar = CpuBackend


@pytest.mark.parametrize("best", list(CPU_VARIANTS))
def test_every_variant_conforms(best: str, three_threads: None) -> None:
    """A library without the variants after this one, so that it runs this one."""
    names = list(CPU_VARIANTS)
    backend = NativeBackend.at(build_library(cpu_recipe(names[: names.index(best) + 1])))()
    if backend.library.variant != best:
        pytest.skip(f"this processor runs {backend.library.variant}, not {best}")
    for check in checks(backend, "cpu", seed=2):
        check.run()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_shows_the_abi_and_shares_no_symbol_between_variants() -> None:
    """A weak symbol is a function that several variants brought along, of which the linker kept any one."""
    path = CpuBackend().library.path
    listing = subprocess.run(("nm", "--defined-only", path), capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    assert not [name for kind, name in symbols if kind in "WVu"]
    shown = {name for kind, name in symbols if kind == "T"}
    assert shown == {f"pagemgr_{name}" for name in ("abi_version", "struct_size", *FUNCTIONS)}


def test_ids_lengths_and_slots_out_of_range_are_errors_and_harm_nothing() -> None:
    backend = CpuBackend()
    case = Case(torch.float32, head_dim=64, block_size=16, group_size=2, seqs=((40, 1), (19, 3)))
    given = build(case, torch.Generator().manual_seed(1), "cpu")
    kv, batch, count = given.kv, given.batch, len(given.pool)
    for id_ in (-1, count, 2**31 - 1):
        table = batch.block_table.clone()
        table[1, 0] = id_
        with pytest.raises(InvalidInput, match="attention: a block id is not in the pool"):
            backend.attention(given.query, kv, replace(batch, block_table=table), given.params)
    for length in (-3, 41):
        lens = torch.tensor([length, 19], dtype=torch.int32)
        with pytest.raises(InvalidInput, match="attention: a length is below 0 or above max_seq_len"):
            backend.attention(given.query, kv, replace(batch, seq_lens=lens), given.params)
    before = given.pool.clone()
    for slot in (-2, count * 16, 2**62):
        with pytest.raises(InvalidInput, match="write_kv: a slot is neither in the pool nor -1"):
            backend.write_kv(torch.ones(1, 2, 64), torch.ones(1, 2, 64), kv, torch.tensor([slot]))
    for pair in ([1, count], [-1, 2]):
        with pytest.raises(InvalidInput, match="copy_blocks: a block id is not in the pool"):
            backend.copy_blocks(given.pool, given.pool, torch.tensor([pair]))
    assert torch.equal(given.pool, before)
    torch.testing.assert_close(
        backend.attention(given.query, kv, batch, given.params).double(), given.expected()[0], atol=5e-5, rtol=5e-5
    )


def test_a_workspace_that_is_too_small_is_refused() -> None:
    library = CpuBackend().library
    args = library.ffi.new("pagemgr_attention_args *")
    args.run.num_threads, args.num_q_heads, args.max_query_len = 1, 4, 1
    args.kv.num_kv_heads, args.kv.block_size, args.kv.head_dim = 4, 16, 64
    size = library.ffi.new("int64_t *")
    library.call("attention_workspace", args, size)
    args.workspace_bytes = size[0] - 1
    with pytest.raises(InvalidInput, match="the workspace is smaller than pagemgr_attention_workspace says"):
        library.call("attention", args)


@pytest.mark.parametrize("kv_dtype", [None, *LARGEST], ids=str)
@pytest.mark.parametrize("new", [1, 40], ids="{}-new".format)
def test_what_is_not_finite_is_seen_in_the_output_of_its_head_alone(new: int, kv_dtype: torch.dtype | None) -> None:
    backend = CpuBackend()
    for part, bad in ((0, torch.nan), (1, torch.nan), (0, torch.inf), (1, -torch.inf)):
        case = Case(torch.float32, head_dim=64, block_size=16, group_size=2, seqs=((90, new), (40, 1)))
        given = build(replace(case, kv_dtype=kv_dtype), torch.Generator().manual_seed(5), "cpu")
        rows = torch.randn(2, 1, 2, 64)
        rows[part, :, 1] = bad
        slot = given.batch.block_table[0, 3:4].long() * 16 + 2  # position 50
        backend.write_kv(rows[0], rows[1], given.kv, slot)
        out = backend.attention(given.query, given.kv, given.batch, given.params)
        seen = torch.arange(90 - new, 90) >= 50
        finite = out.isfinite().all(-1)
        assert not finite[:new][seen][:, 2:].any()
        assert finite[:new][~seen].all()
        assert finite[:, :2].all()
        assert finite[new:].all()
