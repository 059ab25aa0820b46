"""Which backends there are, which can run here, and the one a pool gets.

Built-in backends stand in one table, so that a bare checkout has them; a third party's come from the entry-point group
``pagemgr.backends``, each naming a class that implements ``Backend`` and is constructed without arguments:

    [project.entry-points."pagemgr.backends"]
    mine = "my_package.backend:MyBackend"

A plugin that cannot be loaded is reported by ``availability`` and disturbs nobody else. A name that is a path, such as
``./libmine.so``, is a compiled library that implements ``native/pagemgr_abi.h``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import torch

from pagemgr.errors import BackendUnavailable, UnsupportedFeature
from pagemgr.layout import BlockLayout, KVDType

from .checks import require
from .interface import Backend, Feature
from .per_feature import PerFeature

AUTO = "auto"
GROUP = "pagemgr.backends"

BUILT_IN = (
    EntryPoint("cuda", "pagemgr.backends.cuda:CudaBackend", GROUP),
    EntryPoint("triton", "pagemgr.backends.triton.backend:TritonBackend", GROUP),
    EntryPoint("cpu", "pagemgr.backends.cpu:CpuBackend", GROUP),
    EntryPoint("torch", "pagemgr.backends.reference:TorchBackend", GROUP),
)
"""Best first, which is the order in which ``"auto"`` tries them: the fastest as measured, and torch last."""

_log = logging.getLogger(GROUP)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can run on this machine; if not, ``reason`` says why and what to do, else it is empty."""

    name: str
    available: bool
    reason: str


def names() -> list[str]:
    """Every known backend: the built-in ones, best first, then the others."""
    return list(_known())


def availability() -> list[BackendStatus]:
    """What each known backend says about this machine, in the order of ``names``."""
    return [_status(entry) for entry in _known().values()]


def create(
    name: str,
    layout: BlockLayout,
    group_size: int,
    device: torch.device | str,
    needs: frozenset[Feature] = frozenset(),
    cache_dir: str | None = None,
) -> Backend:
    """The backend of that name, able to serve a pool of this layout on this device with the features in ``needs``.

    ``group_size`` is query heads per K/V head. ``"auto"`` takes the first of ``BUILT_IN`` that can do it, and logs why
    the ones before it cannot; what it lacks of the optional features, the next ones do (``PerFeature``). A third
    party's backend is taken only by name. A compiled one is built on first use, and
    kept in ``cache_dir`` (the setting ``native.cache_dir``, by default that of ``pagemgr.native.build``).

    Raises ``BackendUnavailable`` (unknown, broken, or not for this machine) or ``UnsupportedFeature``.
    """
    if name == AUTO:
        return _best(layout, group_size, device, needs, cache_dir)
    backend = _open_library(name) if _is_path(name) else _make(_known_as(name), cache_dir)
    require(backend, layout, group_size, device, needs)
    return backend


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith(".so")


def _open_library(path: str) -> Backend:
    from .native import NativeBackend  # what a bare checkout runs on must not need cffi

    return NativeBackend.at(path)()


def _known_as(name: str) -> EntryPoint:
    known = _known()
    if name not in known:
        reason = f"no backend has this name; known are {', '.join((AUTO, *known))}, or give the path of a library"
        raise BackendUnavailable(name, reason)
    return known[name]


def _known() -> dict[str, EntryPoint]:
    known: dict[str, EntryPoint] = {}
    for entry in (*BUILT_IN, *sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))):
        first = known.setdefault(entry.name, entry)
        if first.value != entry.value:
            _log.warning("backend %r at %s is ignored: %s has the name", entry.name, entry.value, first.value)
    return known


def _status(entry: EntryPoint) -> BackendStatus:
    try:
        _load(entry)
    except BackendUnavailable as error:
        return BackendStatus(entry.name, available=False, reason=error.reason)
    return BackendStatus(entry.name, available=True, reason="")


def _load(entry: EntryPoint) -> type[Backend]:
    try:
        backend_class: type[Backend] = entry.load()
        reason = backend_class.probe()
    except Exception as error:  # a plugin is somebody else's code: whatever it raises is its status, not our crash
        raise BackendUnavailable(entry.name, f"{entry.value} does not load: {_describe(error)}") from error
    if reason is not None:
        raise BackendUnavailable(entry.name, reason)
    return backend_class


def _make(entry: EntryPoint, cache_dir: str | None) -> Backend:
    backend_class = _load(entry)
    if cache_dir is not None and hasattr(backend_class, "cached_in"):  # it is built, see native.BuiltBackend
        backend_class = backend_class.cached_in(cache_dir)
    try:
        backend = backend_class()
    except BackendUnavailable:
        raise
    except Exception as error:
        raise BackendUnavailable(entry.name, f"{entry.value} cannot be constructed: {_describe(error)}") from error
    if not isinstance(backend, Backend):
        raise BackendUnavailable(entry.name, f"{entry.value} lacks methods of pagemgr.backends.Backend")
    return backend


def _best(
    layout: BlockLayout, group_size: int, device: torch.device | str, needs: frozenset[Feature], cache_dir: str | None
) -> Backend:
    """The first that fits; with it those after it that have the optional features which it lacks, if it lacks any."""
    taken: list[Backend] = []
    lacking, passed_over = frozenset(Feature), list[str]()
    for entry in _best_first(layout):
        try:
            backend = _make(entry, cache_dir)
            require(backend, layout, group_size, device)
        except BackendUnavailable as error:
            passed_over.append(f"{entry.name} cannot run here: {error.reason}")
        except UnsupportedFeature as error:
            passed_over.append(f"{entry.name} does not fit: {'; '.join(error.reasons)}")
        else:
            if lacking & (has := backend.capabilities().features):
                taken.append(backend)
                lacking -= has
            if not lacking:
                break
    if not taken:
        raise BackendUnavailable(AUTO, "; ".join(passed_over))
    best = taken[0] if len(taken) == 1 else PerFeature(taken)
    require(best, layout, group_size, device, needs)
    _log.info("backend %s on %s%s", best.name, device, "".join(f" ({reason})" for reason in passed_over))
    return best


def _best_first(layout: BlockLayout) -> Sequence[EntryPoint]:
    """``BUILT_IN``, but Triton before all for quantised K and V.

    From them the CUDA library takes up to 1.8 times as long to decode, and 1.5 to 13 times for prompts, where it widens
    them for every tile of queries.
    """
    if layout.kv_dtype is KVDType.auto:
        return BUILT_IN
    return sorted(BUILT_IN, key=lambda entry: entry.name != "triton")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
