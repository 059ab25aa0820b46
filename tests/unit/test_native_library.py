"""The door to compiled kernels: a library of one's own through config, and every way in which a file can be wrong."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagemgr import Config, PagedKVCache
from pagemgr.backends import KVLayer, create
from pagemgr.backends.cases import Case, build
from pagemgr.backends.conformance import checks
from pagemgr.backends.native import NativeBackend
from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import BackendUnavailable, InternalError, InvalidInput, NativeAbiMismatch, UnsupportedFeature
from pagemgr.layout import BlockLayout
from pagemgr.native.build import SOURCES

SOURCE = Path(__file__).with_name("own_library.c")
LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16)

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compile_own(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile own_library.c with these flags."""

    def compile_own(*flags: str) -> Path:
        path = tmp_path_factory.mktemp("own") / "libmine.so"
        command = ("gcc", "-shared", "-fPIC", "-O1", f"-I{SOURCES}", *flags, str(SOURCE), "-o", str(path), "-lm")
        subprocess.run(command, check=True)
        return path

    return compile_own


@pytest.fixture(scope="module")
def own(compile_own: Compile) -> Path:
    return compile_own()


def test_a_library_of_ones_own_passes_the_conformance_suite(own: Path) -> None:
    backend = NativeBackend.at(own)()
    found = checks(backend, "cpu")
    assert len(found) >= 50
    for check in found:
        check.run()


def test_config_takes_the_path_of_a_library(own: Path) -> None:
    model = {"num_layers": 1, "num_kv_heads": 2, "num_q_heads": 4, "head_dim": 64}
    caches = [
        PagedKVCache(Config(model=model, pool={"num_blocks": 8}, device="cpu", backend=backend))
        for backend in (str(own), "torch")
    ]
    assert caches[0].backend.name == str(own)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(20, 4, 64, generator=generator)
    key, value = torch.randn(2, 20, 2, 64, generator=generator)
    outs = []
    for cache in caches:
        with cache.step([cache.add(range(20))], [range(20)]) as step:
            outs.append(step.attention(0, query, key, value))
            step.commit()
    torch.testing.assert_close(outs[0], outs[1])


def test_what_a_library_does_not_declare_is_refused(own: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="head_dim 32 is not one of 64, 128") as error:
        create(str(own), BlockLayout(1, 2, 32, 16), 1, "cpu")
    assert error.value.backend == str(own)


def test_a_relative_path_and_the_home_folder_are_understood(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("HOME", str(own.parent))
    for path in ("libmine.so", "./libmine.so", "~/libmine.so"):
        assert create(path, LAYOUT, 1, "cpu").name == path


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "libnone.so"
    with pytest.raises(BackendUnavailable, match=f"there is no library {path}: compile it for this machine"):
        create(str(path), LAYOUT, 1, "cpu")
    assert "there is no library" in (NativeBackend.at(path).probe() or "")


@pytest.mark.parametrize("kept", [0, 3, 63, 64, 700, 0.3, 0.7])
def test_a_library_cut_short_is_refused_and_never_loaded(own: Path, tmp_path: Path, kept: float) -> None:
    content = own.read_bytes()
    cut = tmp_path / "libcut.so"
    cut.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(BackendUnavailable, match="no shared library, or cut short: compile it"):
        create(str(cut), LAYOUT, 1, "cpu")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libtext.so"
    path.write_text("#!/bin/sh\n" * 50)
    with pytest.raises(BackendUnavailable, match="no shared library"):
        create(str(path), LAYOUT, 1, "cpu")


def test_a_library_for_another_machine_is_refused(own: Path, tmp_path: Path) -> None:
    foreign = bytearray(own.read_bytes())
    foreign[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    path = tmp_path / "libforeign.so"
    path.write_bytes(foreign)
    with pytest.raises(BackendUnavailable, match="does not load"):
        create(str(path), LAYOUT, 1, "cpu")


def test_a_library_of_something_else_is_no_match(tmp_path: Path) -> None:
    path = tmp_path / "libother.so"
    subprocess.run(
        ("gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(path)), input=b"int answer(void) { return 42; }", check=True
    )
    with pytest.raises(NativeAbiMismatch, match="pagemgr_abi_version, so it is no library for pagemgr") as error:
        create(str(path), LAYOUT, 1, "cpu")
    assert error.value.library == path


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("-DVERSION=0", "it implements version 0 of the ABI, this pagemgr needs 3: compile it"),
        ("-DVERSION=2", "it implements version 2 of the ABI"),
        ("-DEXTRA_BYTES=8", "its pagemgr_attention_args has 288 bytes, that of this pagemgr 280"),
        ("-DNO_MERGE", "it does not have pagemgr_merge"),
    ],
)
def test_a_library_of_another_version_is_no_match(compile_own: Compile, flag: str, message: str) -> None:
    path = compile_own(flag)
    with pytest.raises(NativeAbiMismatch, match=message) as error:
        create(str(path), LAYOUT, 1, "cpu")
    assert str(path) in error.value.reason


def test_a_library_that_cannot_run_here_says_why(compile_own: Compile) -> None:
    with pytest.raises(BackendUnavailable, match="no device: plug one in"):
        create(str(compile_own("-DNO_DEVICE")), LAYOUT, 1, "cpu")


@pytest.mark.parametrize(
    ("status", "error"),
    [(1, InvalidInput), (2, UnsupportedFeature), (3, BackendUnavailable), (77, InternalError)],
)
def test_a_status_becomes_an_exception(
    own: Path, status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = NativeBackend.at(own)().library

    class Failing:
        """The library, but for one function."""

        def __getattr__(self, name: str) -> object:
            return (lambda args: status) if name == "pagemgr_merge" else getattr(real, name)

    real = library.lib
    monkeypatch.setattr(library, "lib", Failing())
    with pytest.raises(error):
        library.call("merge", None)


def test_what_was_checked_for_one_layer_is_not_taken_for_another_call(own: Path) -> None:
    """The layers of a step are checked once; whatever differs in more than addresses is checked again."""
    backend = NativeBackend.at(own)()
    case = Case(torch.float32, head_dim=64, block_size=16, group_size=2, seqs=((40, 1), (19, 3)), with_lse=True)
    first, second = (build(case, torch.Generator().manual_seed(seed), "cpu") for seed in (1, 2))
    batch, params = first.batch, first.params
    for query, kv in ((first.query, first.kv), (second.query, first.kv), (second.query.contiguous(), second.kv)):
        kv = KVLayer(kv.key.nan_to_num(), kv.value.nan_to_num())
        lse = torch.empty(query.shape[:2])
        wanted_lse = torch.empty_like(lse)
        wanted = TorchBackend().attention(query, kv, batch, params, lse=wanted_lse)
        for given in (lse, None, lse):
            torch.testing.assert_close(backend.attention(query, kv, batch, params, lse=given), wanted)
        torch.testing.assert_close(lse, wanted_lse)
    with pytest.raises(InvalidInput, match="query must be"):
        backend.attention(first.query.double(), first.kv, batch, params)
    with pytest.raises(UnsupportedFeature, match="softcap"):
        backend.attention(first.query, first.kv, batch, replace(params, softcap=2.0))
