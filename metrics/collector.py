"""From snapshots to what Prometheus reads. The work is done when somebody scrapes; the hot path pays nothing."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Iterable
from importlib import metadata
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from pagemgr import __version__
from pagemgr.errors import InvalidInput
from pagemgr.stats import BUCKETS, Histogram
from pagemgr.stats import Exemplar as Duration

from .metric import Metric, Pool, Reading
from .names import BUILD_INFO, METRICS, UP
from .vllm import ALIASES, identity

if TYPE_CHECKING:
    from pagemgr.cache import PagedKVCache

_BOUNDS = (*map(repr, BUCKETS), "+Inf")

_log = logging.getLogger("pagemgr.metrics")


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
        self._metrics = (*METRICS.values(), *(ALIASES if any(pool.vllm_names for pool in pools) else ()))

    def describe(self) -> Iterable[Family]:
        """The metrics without samples, so that registering takes no snapshot."""
        return list(self._families().values())

    def collect(self) -> Iterable[Family]:
        """All metrics of all pools."""
        families = self._families()
        families[BUILD_INFO].add_sample(BUILD_INFO, _versions(), 1)
        for pool in self._pools:
            readings = _read(pool)
            families[UP].add_sample(UP, {"pool": pool.name}, float(bool(readings)))
            for metric, labels, values in readings:
                for each, value in values:
                    _add(families[metric.name], metric, labels | dict(zip(metric.labels, each, strict=True)), value)
        return list(families.values())

    def _families(self) -> dict[str, Family]:
        return {metric.name: _family(metric) for metric in self._metrics}


def collector(*caches: PagedKVCache) -> PoolCollector:
    """A collector over these caches; ``metrics.pool`` of their configs tells them apart.

    An engine that holds a ``BlockManager`` without a cache makes its ``PoolCollector`` of a ``Pool``.
    """
    return PoolCollector(*(_pool(cache) for cache in caches))


def _pool(cache: PagedKVCache) -> Pool:
    return Pool(
        name=cache.config.metrics.pool,
        stats=cache.stats,
        block_bytes=cache.layout.block_bytes,
        policy=cache.config.eviction.policy,
        backend=cache.backend.name,
        device=str(cache.device),
        dtype=cache.layout.dtype.value,
        vllm_names=cache.config.metrics.vllm_names,
    )


@functools.cache
def _versions() -> dict[str, str]:
    """Labels of ``pagemgr_build_info``; torch is asked for its version without being loaded."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return {"version": __version__, "python": platform.python_version(), "torch": torch}


def _family(metric: Metric) -> Family:
    suffix = {"counter": "_total", "info": "_info"}.get(metric.kind, "")
    return Family(metric.name.removesuffix(suffix), metric.meaning, metric.kind)


def _read(pool: Pool) -> list[tuple[Metric, dict[str, str], list[Reading]]]:
    """Every metric of one pool, with the labels that name the pool; nothing if it cannot be read."""
    try:
        stats = pool.stats()
        readings = [(metric, {"pool": pool.name}, list(metric.read(pool, stats))) for metric in METRICS.values()]
        if pool.vllm_names:
            readings += [(alias, identity(pool), list(alias.read(pool, stats))) for alias in ALIASES]
        return readings
    except Exception:  # whatever a fence may raise: an operator reads of it here, and the engine where it happened
        _log.exception("pool %r cannot be read", pool.name)
        return []


def _add(family: Family, metric: Metric, labels: dict[str, str], value: float | Histogram) -> None:
    if not isinstance(value, Histogram):
        family.add_sample(metric.name, labels, value)
        return
    buckets = zip(_BOUNDS, accumulate(value.counts), value.exemplars, strict=True)
    for bound, count, exemplar in buckets:
        family.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, count, exemplar=_exemplar(exemplar))
    family.add_sample(f"{metric.name}_count", labels, sum(value.counts))
    family.add_sample(f"{metric.name}_sum", labels, value.sum)


def _exemplar(duration: Duration | None) -> Exemplar | None:
    if duration is None:
        return None
    labels, seconds, timestamp = duration
    return Exemplar({name: str(value) for name, value in labels.items()}, seconds, timestamp)
