"""Where every byte of a pool went, for Prometheus.

server = pagemgr.metrics.serve(cache)                    # /metrics where cache.config.metrics says
registry.register(pagemgr.metrics.collector(cache))      # or in a registry that the engine serves already
"""

from .collector import Pool, PoolCollector, bytes_by_cause, collector
from .names import METRICS
from .server import Server, serve

__all__ = ["METRICS", "Pool", "PoolCollector", "Server", "bytes_by_cause", "collector", "serve"]
