"""Policies by name: ours, and those of third parties from the entry-point group ``pagemgr.eviction``.

    [project.entry-points."pagemgr.eviction"]
    mine = "my_package.eviction:MyPolicy"

An entry names what makes a policy, called with the number of blocks of a tier and its ``Prefixes``. Nothing of it is
loaded before a pool wants it by name, and our own names cannot be taken.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from pagemgr.errors import ConfigError

from .frequency import LFU, S3FIFO
from .hit_density import HitDensity
from .interface import EvictionPolicy, PolicyFactory, Prefixes
from .recency import LRU

GROUP = "pagemgr.eviction"

_BUILT_IN: dict[str, PolicyFactory] = {
    "lru": lambda num_blocks, prefixes: LRU(num_blocks),
    "lfu": LFU,
    "s3fifo": S3FIFO,
    "hit_density": HitDensity,
}


def names() -> list[str]:
    """Every name there is, ours first."""
    return [*_BUILT_IN, *sorted(_plugins())]


def make_policy(name: str, num_blocks: int, prefixes: Prefixes) -> EvictionPolicy:
    """The policy called ``name``. Raises ``ConfigError`` for one that is unknown or cannot be loaded."""
    if name in _BUILT_IN:
        return _BUILT_IN[name](num_blocks, prefixes)
    plugins = _plugins()
    if name not in plugins:
        raise ConfigError(f"eviction.policy = {name!r} is unknown; there are: {', '.join(names())}")
    entry = plugins[name]
    try:
        policy = entry.load()(num_blocks, prefixes)
    except Exception as error:  # somebody else's code: whatever it raises is its status, not our crash
        raise ConfigError(
            f"eviction.policy = {name!r}: {entry.value} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(policy, EvictionPolicy):
        raise ConfigError(f"eviction.policy = {name!r}: {entry.value} lacks methods of pagemgr.eviction.EvictionPolicy")
    return policy


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name not in _BUILT_IN:
            found.setdefault(entry.name, entry)
    return found
