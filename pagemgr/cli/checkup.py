"""What ``pagemgr doctor`` looks at beside the backends: each a finding, a verdict, and what to do if it is not good."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pagemgr.config import load_native
from pagemgr.errors import ConfigError, PagemgrError
from pagemgr.eviction import registry as eviction
from pagemgr.native.build import CPU_COMPILERS, recipe
from pagemgr.prefix import PrefixIndex

from .output import amount

GOOD, WORSE, BROKEN = "good", "worse", "broken"
"""Verdicts: works; works, but slower or with less than there could be; does not work and was meant to."""
DRIVER = Path("/proc/driver/nvidia/version")
GPU_NODES = Path("/dev")
SHARED_MEMORY = Path("/dev/shm")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
ENOUGH_SHARED = 1 << 30
ENOUGH_FILES = 1024
EXTRAS = {
    "serve": "uvicorn",
    "kv_events": "pyzmq",
    "otel": "opentelemetry-api",
    "hf": "transformers",
    "demo": "matplotlib",
}
"""Extra of ours → the package by which it is told."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    verdict: str = GOOD
    advice: str = ""


def checkup() -> Iterator[Finding]:
    """Everything, in order. What cannot even be looked at is a finding too."""
    for look in (driver, compiler, libraries, policies, shared_memory, limits, memory_limit, extras):
        try:
            yield from look()
        except Exception as error:  # a machine where little works is what this is for
            yield Finding(
                look.__name__.replace("_", " "), f"{type(error).__name__}: {error}", BROKEN, "please report it"
            )


def driver() -> Iterator[Finding]:
    """The NVIDIA driver, and whether torch can use what it drives."""
    version = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.exists() else None
    gpus = len(list(GPU_NODES.glob("nvidia[0-9]*")))
    if version is None:
        lost = "there are GPUs without a driver: install NVIDIA's, or start the container with --gpus all"
        yield Finding("driver", "none", WORSE if gpus else GOOD, lost if gpus else "")
        return
    import torch

    if torch.cuda.is_available():
        yield Finding("driver", version)
    else:
        advice = "torch cannot use it: install the CUDA build of torch, no newer than the driver allows"
        yield Finding("driver", version, WORSE, advice)


def compiler() -> Iterator[Finding]:
    """What compiles the CPU backend and the manager's hot loops."""
    found = next(filter(None, map(shutil.which, CPU_COMPILERS)), None)
    advice = "the manager runs slower and the cpu backend not at all without one: apt install g++"
    yield Finding("compiler", found or "none", GOOD if found else WORSE, "" if found else advice)


def libraries() -> Iterator[Finding]:
    """The compiled libraries: whether they are built, load, and implement this version's interfaces."""
    import torch

    cache_dir = load_native().cache_dir
    for target, opens in (("manager", _open_manager), ("cpu", _open_backend), ("cuda", _open_backend)):
        name = f"library {target}"
        try:
            path = recipe(target).path(cache_dir)
        except PagemgrError as error:
            yield Finding(name, "cannot be built here", GOOD, str(error))
            continue
        if not path.exists():
            yield Finding(name, "not built yet", GOOD, "built on first use, or now: pagemgr build")
            continue
        if target == "cuda" and not torch.cuda.is_available():
            yield Finding(name, f"{path}, for a machine with a GPU")
            continue
        problem = opens(target, path, cache_dir)
        advice = f"delete {path}, it is built anew on first use"
        yield Finding(name, problem or str(path), BROKEN if problem else GOOD, advice if problem else "")


def policies() -> Iterator[Finding]:
    """Eviction policies of third parties. (Backends of third parties are in the list of backends.)"""
    for name in eviction.names():
        try:
            eviction.make_policy(name, 4, PrefixIndex(4, 1)).victims(0)
        except ConfigError as error:
            yield Finding(f"policy {name}", str(error), BROKEN, "repair or uninstall the package that registers it")
    yield Finding("policies", ", ".join(eviction.names()))


def shared_memory() -> Iterator[Finding]:
    """Where processes share tensors."""
    if not SHARED_MEMORY.is_dir() or not os.access(SHARED_MEMORY, os.W_OK):
        advice = "engines of several processes need it: mount a tmpfs there"
        yield Finding("shared memory", f"{SHARED_MEMORY} cannot be written", WORSE, advice)
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    advice = "engines of several processes may run out: docker run --shm-size=8g, or remount it larger"
    small = free < ENOUGH_SHARED
    yield Finding("shared memory", f"{amount(free)} free", WORSE if small else GOOD, advice if small else "")


def limits() -> Iterator[Finding]:
    """Of this process: open files, and memory that may be locked."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < ENOUGH_FILES
    advice = "a server with many clients may run out: ulimit -n 65536"
    yield Finding("open files", _limit(files, str), WORSE if few else GOOD, advice if few else "")
    yield Finding("locked memory", _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], amount))


def memory_limit() -> Iterator[Finding]:
    """What the container may use, which the machine's free memory does not say."""
    if CGROUP_LIMIT.exists():
        text = CGROUP_LIMIT.read_text(encoding="utf-8").strip()
        yield Finding("container memory", "unlimited" if text == "max" else amount(int(text)))


def extras() -> Iterator[Finding]:
    """Optional parts."""
    for extra, package in EXTRAS.items():
        try:
            yield Finding(f"extra {extra}", f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Finding(f"extra {extra}", "not installed", GOOD, f"if you want it: pip install 'pagemgr[{extra}]'")


def _open_manager(_: str, path: Path, cache_dir: str) -> str | None:
    from pagemgr import accelerator

    return None if accelerator.load(cache_dir) is not None else f"{path} does not load, or is of another version"


def _open_backend(target: str, path: Path, _: str) -> str | None:
    from pagemgr.backends.library import NativeLibrary

    try:
        NativeLibrary(target, path, "")
    except PagemgrError as error:
        return str(error)
    return None


def _limit(value: int, shown: Callable[[int], str]) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else shown(value)
