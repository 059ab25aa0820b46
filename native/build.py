"""From the sources beside this file to a shared library in a cache directory.

    cache_dir/libpagemgr_cpu-<key>.so       key: every source, the compiler with its version, its flags, the machine

What stands under its key is whole: it is linked in a scratch folder and moved into place in one step. Processes that
want the same library wait for the one that builds it, by a lock that its death releases; the next one starts afresh.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pagemgr.errors import BackendUnavailable

TARGETS = ("cpu", "cuda")

SOURCES = Path(__file__).resolve().parent

DEFAULT_CACHE_DIR = "~/.cache/pagemgr"

CPU_COMPILERS = ("g++", "c++", "clang++")

CPU_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)

CPU_VARIANTS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "amx": ("-march=sapphirerapids",),
}
"""The kernels are compiled once for each that the compiler knows, which is none but the first on another architecture;
the library picks the best that the processor has when it is loaded."""

CUDA_FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
    *("-gencode", "arch=compute_90,code=compute_90"),
)

_log = logging.getLogger("pagemgr.native")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one library is made: each unit is compiled to an object, then all are linked."""

    target: str
    """``"cpu"`` or ``"cuda"``, the library of the backend of this name, or ``"manager"``, the manager's hot loops."""
    compiler: str
    units: tuple[tuple[Path, tuple[str, ...]], ...]
    """(source, flags)."""
    link_flags: tuple[str, ...]

    def key(self) -> str:
        """What the library depends on, as a name."""
        digest = hashlib.sha256()
        parts = [self.target, _version(self.compiler), platform.machine(), *self.link_flags]
        parts += [f"{path.name} {shlex.join(flags)}" for path, flags in self.units]
        for path in (*sorted(SOURCES.glob("*.h*")), *sorted((SOURCES / self.target).rglob("*.[ch]*"))):
            parts += [path.name, path.read_text(encoding="utf-8")]
        for part in parts:
            digest.update(f"{len(part)}:{part}".encode())
        return digest.hexdigest()[:20]

    def path(self, cache_dir: str | Path) -> Path:
        """Where the library is, once it is built."""
        return Path(cache_dir).expanduser() / f"libpagemgr_{self.target}-{self.key()}.so"


def recipe(target: str) -> Recipe:
    """How to make the library for a target here; ``BackendUnavailable`` if there is no compiler."""
    recipes = {"cpu": cpu_recipe, "cuda": _cuda_recipe, "manager": _manager_recipe}
    return recipes[target]()


def build(made_by: Recipe, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> Path:
    """The path of the library, built first if it is not in the cache. ``BackendUnavailable`` says why it cannot be."""
    path = made_by.path(cache_dir)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it while this one waited
                _build(made_by, path)
    except OSError as error:
        reason = f"cannot build {path}: {error}; set native.cache_dir to a folder that can be written"
        raise BackendUnavailable(made_by.target, reason) from error
    return path


def cpu_recipe(variants: Sequence[str] | None = None, extra_flags: Sequence[str] = ()) -> Recipe:
    """The CPU library, for all variants that this machine's architecture knows unless told otherwise."""
    compiler = _cpp_compiler("cpu")
    if variants is None:
        variants = [name for name, machine in CPU_VARIANTS.items() if _accepts(compiler, machine)]
    flags = (*CPU_FLAGS, *extra_flags)
    units = [(path, (*flags, *(f"-DPAGEMGR_HAS_{name}" for name in variants))) for path in _sources("cpu", "*.cpp")]
    for variant in variants:
        machine = (*flags, *CPU_VARIANTS[variant], f"-DPAGEMGR_VARIANT={variant}")
        units += [(path, machine) for path in _sources("cpu/simd", "*.cpp")]
    return Recipe("cpu", compiler, tuple(units), ("-shared", "-fopenmp", *extra_flags))


def _manager_recipe() -> Recipe:
    """The hot loops of the block manager."""
    flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
    units = tuple((path, flags) for path in sorted((SOURCES / "manager").glob("*.cpp")))
    return Recipe("manager", _cpp_compiler("manager"), units, ("-shared",))


def _cpp_compiler(target: str) -> str:
    compiler = next(filter(None, map(shutil.which, CPU_COMPILERS)), None)
    if compiler is None:
        raise BackendUnavailable(target, "no C++ compiler is on the PATH: install one (on Debian: apt install g++)")
    return compiler


def _cuda_recipe() -> Recipe:
    nvcc = _find_nvcc()
    if nvcc is None:
        raise BackendUnavailable(
            "cuda", "nvcc is neither on the PATH nor installed by pip: install the CUDA toolkit or nvidia-cuda-nvcc"
        )
    units = tuple((path, CUDA_FLAGS) for path in _sources("cuda", "*.cu"))
    if not units:
        raise BackendUnavailable("cuda", f"there are no kernels in {SOURCES / 'cuda'}")
    libraries = tuple(f"-L{path}" for path in (nvcc.parents[1] / "lib",) if path.is_dir())
    return Recipe("cuda", str(nvcc), units, ("-shared", "-cudart", "static", *libraries))


def _sources(folder: str, pattern: str) -> list[Path]:
    return sorted((SOURCES / folder).glob(pattern))


def _find_nvcc() -> Path | None:
    """A toolkit's, or else that of the nvidia-cuda-nvcc wheel."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found:
        return Path(found)
    wheels = importlib.util.find_spec("nvidia")
    folders = [] if wheels is None else list(wheels.submodule_search_locations or ())
    return next((path for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"))), None)


def _build(made_by: Recipe, path: Path) -> None:
    """With the lock held: whatever else carries this key was left behind by a process that died."""
    for leftover in path.parent.glob(f"{path.stem}.building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _log.info("building %s with %s, once", path, made_by.compiler)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}.building-", dir=path.parent) as scratch:
        objects = [str(Path(scratch, f"{number}.o")) for number in range(len(made_by.units))]
        compiles = [
            (made_by.compiler, *flags, "-c", str(source), "-o", target)
            for (source, flags), target in zip(made_by.units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in [pool.submit(_run, made_by.target, command) for command in compiles]:
                result.result()
        library = Path(scratch, path.name)
        _run(made_by.target, (made_by.compiler, *objects, *made_by.link_flags, "-o", str(library)))
        library.replace(path)
    _log.info("built %s in %.1f s", path, time.perf_counter() - started)


def _run(target: str, command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        message = done.stdout.decode(errors="replace").strip()
        raise BackendUnavailable(target, f"the compiler failed: {shlex.join(command)}\n{message}")


def _version(compiler: str) -> str:
    done = subprocess.run((compiler, "--version"), capture_output=True, check=False)
    return compiler + done.stdout.decode(errors="replace")


@functools.cache
def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    command = (compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
