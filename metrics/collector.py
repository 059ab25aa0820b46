"""From snapshots to what Prometheus reads. The work is done when somebody scrapes; the hot path pays nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pagemgr import __version__
from pagemgr.errors import InvalidInput
from pagemgr.stats import Stats, TierStats

from .names import BUILD_INFO, METRICS, UP

if TYPE_CHECKING:
    from pagemgr.cache import PagedKVCache

STATES = ("null", "free", "open", "full", "cached", "fenced")
Sample = tuple[str, tuple[str, ...], float]
"""Name, the values of its labels, and the value."""

_log = logging.getLogger("pagemgr.metrics")


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


class PoolCollector(Collector):
    """Collects the metrics of the pools of one process, each from one atomic snapshot.

    A registry takes one collector, of all its pools: a second one would repeat the first one's headers, which no
    scraper accepts, so that registering it raises ``ValueError``. Raises ``InvalidInput`` if two pools share a name.

    Scraping never fails: a pool that cannot be read reports ``pagemgr_up`` 0 and nothing else, and the error is logged.
    """

    def __init__(self, *pools: Pool) -> None:
        names = [pool.name for pool in pools]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidInput(f"metrics.pool must differ between pools, but several are called {', '.join(twice)}")
        self._pools = pools

    def describe(self) -> Iterable[Metric]:
        """The metrics without samples, so that registering takes no snapshot."""
        return list(_families().values())

    def collect(self) -> Iterable[Metric]:
        """All metrics of all pools."""
        families = _families()
        families[BUILD_INFO].add_sample(BUILD_INFO, {"version": __version__}, 1)
        for pool in self._pools:
            for name, values, value in _read(pool):
                labels = zip(("pool", *METRICS[name][0]), (pool.name, *values), strict=True)
                families[name].add_sample(name, dict(labels), value)
        return list(families.values())


def collector(*caches: PagedKVCache) -> PoolCollector:
    """A collector over these caches; ``metrics.pool`` of their configs tells them apart.

    An engine that holds a ``BlockManager`` without a cache makes its ``PoolCollector`` of a ``Pool``.
    """
    return PoolCollector(*(_pool(cache) for cache in caches))


def bytes_by_cause(tier: TierStats, block_bytes: int) -> dict[str, int]:
    """Where the bytes of a tier are; the values sum to ``tier.num_blocks * block_bytes``, exactly.

    The causes are the states of its blocks, but for open blocks: those are ``open_used`` as far as their slots hold
    tokens, and ``tail_waste`` as far as they do not yet.
    """
    waste = tier.waste_slots * block_bytes // tier.block_size
    whole = {state: getattr(tier, state) * block_bytes for state in STATES if state != "open"}
    return {"open_used": tier.open * block_bytes - waste, "tail_waste": waste, **whole}


def _pool(cache: PagedKVCache) -> Pool:
    return Pool(
        name=cache.config.metrics.pool,
        stats=cache.stats,
        block_bytes=cache.layout.block_bytes,
        policy=cache.config.eviction.policy,
        backend=cache.backend.name,
    )


def _families() -> dict[str, Metric]:
    return {name: _family(name, text) for name, (_, text) in METRICS.items()}


def _family(name: str, text: str) -> Metric:
    for suffix, kind in (("_total", "counter"), ("_info", "info")):
        if name.endswith(suffix):
            return Metric(name.removesuffix(suffix), text, kind)
    return Metric(name, text, "gauge")


def _read(pool: Pool) -> list[Sample]:
    """Every sample of one pool, or just that it is down."""
    try:
        stats = pool.stats()
        tiers = [sample for tier in stats.tiers for sample in _of_tier(pool, tier)]
        return [(UP, (), 1), *_of_pool(pool, stats), *tiers]
    except Exception:  # whatever a fence may raise: an operator reads of it here, and the engine where it happened
        _log.exception("pool %r cannot be read", pool.name)
        return [(UP, (), 0)]


def _of_pool(pool: Pool, stats: Stats) -> Iterator[Sample]:
    counters = stats.counters
    yield "pagemgr_backend_info", (pool.backend,), 1
    yield "pagemgr_max_sequences", (), stats.max_sequences
    yield "pagemgr_steps_in_flight", (), stats.steps_in_flight
    yield "pagemgr_steps_committed_total", (), counters.steps_committed
    yield "pagemgr_steps_aborted_total", (), counters.steps_aborted
    yield "pagemgr_tokens_committed_total", (), counters.tokens_committed
    yield "pagemgr_prefix_query_tokens_total", (), counters.prefix_query_tokens
    yield "pagemgr_prefix_hit_tokens_total", (), counters.prefix_hit_tokens
    yield "pagemgr_duplicate_blocks_total", (), counters.duplicate_blocks
    yield "pagemgr_cow_copies_total", (), counters.cow_copies
    yield "pagemgr_invariant_violations_total", (), counters.invariant_violations
    for reason, calls in counters.failures.items():
        yield "pagemgr_allocation_failures_total", (reason,), calls
    for direction, blocks in counters.swapped_blocks.items():
        yield "pagemgr_swap_blocks_total", (direction,), blocks
        yield "pagemgr_swap_bytes_total", (direction,), blocks * pool.block_bytes
        yield "pagemgr_swap_sequences_total", (direction,), counters.swapped_sequences[direction]
        yield "pagemgr_swap_failures_total", (direction,), counters.swap_failures[direction]


def _of_tier(pool: Pool, tier: TierStats) -> Iterator[Sample]:
    held = tier.used * tier.block_size
    yield "pagemgr_pool_capacity_bytes", (tier.name,), tier.num_blocks * pool.block_bytes
    for cause, amount in bytes_by_cause(tier, pool.block_bytes).items():
        yield "pagemgr_pool_bytes", (tier.name, cause), amount
    for state in STATES:
        yield "pagemgr_blocks", (tier.name, state), getattr(tier, state)
    yield "pagemgr_pool_utilization_ratio", (tier.name,), tier.utilization
    yield "pagemgr_internal_fragmentation_ratio", (tier.name,), tier.waste_slots / held if held else 0.0
    yield "pagemgr_sharing_saved_bytes", (tier.name,), tier.saved * pool.block_bytes
    yield "pagemgr_sequences", (tier.name,), tier.sequences
    yield "pagemgr_block_allocations_total", (tier.name,), tier.allocated_total
    yield "pagemgr_block_releases_total", (tier.name,), tier.released_total
    yield "pagemgr_evictions_total", (tier.name, pool.policy, "capacity"), tier.evicted_total
