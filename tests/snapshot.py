"""The whole state of a manager as one comparable value: every array byte for byte, every dict, list and handle."""

from __future__ import annotations

import inspect
import threading
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from pagemgr.manager import BlockManager

REFUSALS = ("failures", "invariant_violations")
"""Counters that a refused call is meant to move."""

ENDED_BY_ABORT = ("_next_step", "counters", "_counters", "digest", "num_allocated", "num_released", "tokens")
"""What reserve and abort leave behind: totals of what has happened, and ids of tokens in blocks that nobody holds."""


def snapshot(manager: BlockManager, ignore: tuple[str, ...] = REFUSALS) -> dict[str, Any]:
    """Every field of the manager and of all it is made of by its dotted path, but for those called as in ``ignore``."""
    state: dict[str, Any] = {}
    _walk(manager, "manager", state, ignore, set())
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths at which two snapshots differ."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _walk(value: Any, path: str, state: dict[str, Any], ignore: tuple[str, ...], seen: set[int]) -> None:
    children: dict[str, Any] = {}
    if isinstance(value, np.ndarray):
        state[path] = (value.dtype.str, value.shape, value.tobytes())
    elif isinstance(value, dict):
        state[path] = list(value)
        children = {f"{path}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        state[path] = len(value)
        children = {f"{path}[{i}]": item for i, item in enumerate(value)}
    elif inspect.isroutine(value):
        state[path] = value.__qualname__
    elif type(value).__module__.startswith("pagemgr."):
        state[path] = type(value).__qualname__
        names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
        if id(value) not in seen:
            children = {f"{path}.{name}": getattr(value, name) for name in names if name not in ignore}
        seen.add(id(value))
    elif type(value).__module__ != "_cffi_backend" and not isinstance(value, type(threading.RLock())):
        state[path] = value  # what cffi points to are arrays, and those are walked
    for name, child in children.items():
        _walk(child, name, state, ignore, seen)
