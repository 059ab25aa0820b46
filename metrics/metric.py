"""What a metric is: a name with a meaning, and how it is read from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pagemgr.stats import Counters, Histogram, Stats, TierStats

Value = float | Histogram
Reading = tuple[tuple[str, ...], Value]
"""The values of a metric's labels, in their order, and its value."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What is scraped: where the snapshots of one pool come from, and what they do not say themselves."""

    name: str
    """Value of the label ``pool``."""
    stats: Callable[[], Stats]
    """Takes one atomic snapshot, as ``PagedKVCache.stats`` and ``BlockManager.stats`` do."""
    block_bytes: int
    policy: str
    """Name of the eviction policy."""
    backend: str
    """Name of what computes attention."""
    device: str = ""
    """Where the first tier is, such as ``cuda:0``."""
    dtype: str = ""
    """Element type of K and V."""
    vllm_names: bool = False
    """Whether to report under vLLM's names as well."""


Read = Callable[[Pool, Stats], Iterable[Reading]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. The end of its name says its kind, and ``unit`` what its value counts."""

    name: str
    unit: str
    labels: tuple[str, ...]
    """Beside those that name the pool."""
    meaning: str
    read: Read

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram", "info"]:
        """As Prometheus calls it."""
        if self.name.endswith("_total"):
            return "counter"
        if self.name.endswith("_info"):
            return "info"
        return "histogram" if self.name.endswith("_seconds") else "gauge"


def one(value: Callable[[Stats], float]) -> Read:
    """A single value of the pool."""
    return lambda pool, stats: [((), value(stats))]


def counter(value: Callable[[Counters], float]) -> Read:
    """One of the pool's counters."""
    return lambda pool, stats: [((), value(stats.counters))]


def counters(values: Callable[[Counters], Mapping[str, float]]) -> Read:
    """Several counters, by the label that tells them apart."""
    return lambda pool, stats: [((key,), value) for key, value in values(stats.counters).items()]


def tiers(value: Callable[[TierStats, Pool], float]) -> Read:
    """A value for each tier."""
    return lambda pool, stats: [((tier.name,), value(tier, pool)) for tier in stats.tiers]


def tier_parts(values: Callable[[TierStats, Pool], Mapping[str, float]]) -> Read:
    """Several values for each tier, by the label that tells them apart."""
    return lambda pool, stats: [
        ((tier.name, key), value) for tier in stats.tiers for key, value in values(tier, pool).items()
    ]


def info(*labels: Callable[[Pool], str]) -> Read:
    """What is said by the labels alone."""
    return lambda pool, stats: [(tuple(label(pool) for label in labels), 1)]


def timing(operation: str) -> Read:
    """The histograms of an operation, by its kind; none where nothing is timed."""
    return lambda pool, stats: [((kind,), histogram) for kind, histogram in stats.timings.get(operation, {}).items()]


def elsewhere(pool: Pool, stats: Stats) -> Iterable[Reading]:
    """What the collector says itself, as it is no part of a snapshot."""
    return ()
