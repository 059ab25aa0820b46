"""Building: what the key depends on, processes that start at once or die, failures in the compiler's words."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pagemgr.backends.cpu import CpuBackend
from pagemgr.backends.registry import create
from pagemgr.cli.main import main
from pagemgr.errors import BackendUnavailable, ConfigError
from pagemgr.layout import BlockLayout
from pagemgr.native import build as module
from pagemgr.native.build import Recipe, build, cpu_recipe, recipe

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16)

COMPILER = """#!/bin/sh
# Stands in for a compiler: a line in the log for each call, and a file that takes a while to be written.
[ "$1" = --version ] && { echo "tiny 1"; exit; }
echo $$ "$@" >> "LOG"
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
printf half > "$out"; sleep 0.2; printf whole > "$out"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    """A recipe of two units for a compiler that writes "whole" and takes 0.2 seconds each time."""
    compiler = tmp_path / "tiny"
    compiler.write_text(COMPILER.replace("LOG", str(tmp_path / "log")))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return Recipe("cpu", str(compiler), ((tmp_path / "a.cpp", ("-O3",)), (tmp_path / "b.cpp", ())), ("-shared",))


def calls(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines())


def start(made_by: Recipe, cache: Path) -> subprocess.Popen[str]:
    """Another process that builds this; a group of its own, so that it dies with its compiler."""
    code = (
        "from pathlib import PosixPath; from pagemgr.native.build import Recipe, build;"
        f"print(build({made_by!r}, {str(cache)!r}).read_text())"
    )
    return subprocess.Popen((sys.executable, "-c", code), stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_the_second_time_nothing_is_compiled(tiny: Recipe, tmp_path: Path) -> None:
    path = build(tiny, tmp_path / "cache")
    assert path.read_text() == "whole"
    assert calls(tmp_path) == 3
    assert build(tiny, tmp_path / "cache") == path
    assert calls(tmp_path) == 3


def test_the_key_names_all_that_the_library_depends_on(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {tiny.key(), replace(tiny, target="cuda").key(), replace(tiny, link_flags=()).key()}
    keys.add(replace(tiny, units=((tmp_path / "a.cpp", ("-O2",)), tiny.units[1])).key())
    compiler = Path(tiny.compiler)
    compiler.write_text(compiler.read_text().replace("tiny 1", "tiny 2"))
    keys.add(tiny.key())
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    keys.add(tiny.key())
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "kernel.cpp").write_text("int a;")
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    keys.add(tiny.key())
    (tmp_path / "cpu" / "kernel.cpp").write_text("int b;")
    keys.add(tiny.key())
    assert len(keys) == 8


def test_processes_that_start_at_once_build_once(tiny: Recipe, tmp_path: Path) -> None:
    processes = [start(tiny, tmp_path / "cache") for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 4
    assert calls(tmp_path) == 3
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left == {".so", ".lock"}


def test_a_process_killed_midway_leaves_nothing_that_is_taken_for_a_library(tiny: Recipe, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(tiny, cache)
    deadline = time.monotonic() + 20
    while not (list(cache.glob("*.building-*/*.o"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*.building-*"))
    assert not list(cache.glob("*.so"))
    assert build(tiny, cache).read_text() == "whole"
    assert not list(cache.glob("*.building-*"))


def test_the_compilers_own_message_is_shown(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return missing; }\n")
    made_by = replace(cpu_recipe(), units=((broken, ()),))
    with pytest.raises(BackendUnavailable, match=r"broken\.cpp:1:18: error: .*missing.* was not declared") as error:
        build(made_by, tmp_path / "cache")
    assert made_by.compiler in error.value.reason
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_folder_that_cannot_be_written_names_the_setting(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match=r"file/.*: .* set native\.cache_dir"):
        build(tiny, tmp_path / "file")


def test_without_a_compiler_torch_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CPU_COMPILERS", ("no-such-compiler",))
    assert "no C++ compiler is on the PATH: install one" in (CpuBackend.probe() or "")
    caplog.set_level("INFO", "pagemgr.backends")
    assert create("auto", LAYOUT, 1, "cpu", cache_dir=str(tmp_path)).name == "torch"
    (record,) = caplog.records
    assert "cpu cannot run here: no C++ compiler" in record.getMessage()
    with pytest.raises(BackendUnavailable, match="install one"):
        create("cpu", LAYOUT, 1, "cpu")


def test_nvcc_comes_from_a_toolkit_or_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: None)
    with pytest.raises(BackendUnavailable, match="nvcc is neither on the PATH nor installed by pip"):
        recipe("cuda")
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir()
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match="there are no kernels in"):
        recipe("cuda")
    (tmp_path / "cuda" / "attention.cu").write_text("")
    found = recipe("cuda")
    assert found.compiler == str(nvcc)
    assert [path.name for path, _ in found.units] == ["attention.cu"]
    assert f"-L{nvcc.parents[1] / 'lib'}" in found.link_flags


def test_the_command_prints_where_the_library_is(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_recipe", lambda: tiny)
    monkeypatch.setattr(module, "_find_nvcc", lambda: None)
    runner, cache = CliRunner(), tmp_path / "cache"
    flag = runner.invoke(main, ["build", "cpu", "--native.cache-dir", str(cache)])
    assert flag.stdout.strip() == str(tiny.path(cache))
    monkeypatch.setenv("PAGEMGR_NATIVE__CACHE_DIR", str(tmp_path / "other"))
    variable = runner.invoke(main, ["build"])
    assert str(tiny.path(tmp_path / "other")) in variable.output
    (tmp_path / "pagemgr.toml").write_text('[native]\ncache_dir = ""\n')
    refused = runner.invoke(
        main, ["build", "cpu", "--config", str(tmp_path / "pagemgr.toml")], env={"PAGEMGR_NATIVE__CACHE_DIR": None}
    )
    assert (refused.exit_code, "cache_dir = ''" in refused.output) == (2, True)


def test_a_section_alone_is_loaded_and_unknown_keys_are_refused() -> None:
    from pagemgr.config import NativeConfig, load_native

    assert load_native(environ={}) == NativeConfig()
    assert load_native(environ={"PAGEMGR_NATIVE__CACHE_DIR": "/x"}).cache_dir == "/x"
    with pytest.raises(ConfigError, match=r"native\.cache_dri.*did you mean native\.cache_dir"):
        load_native(environ={"PAGEMGR_NATIVE__CACHE_DRI": "/x"})
