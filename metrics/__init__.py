"""Where every byte of a pool went, for Prometheus.

server = pagemgr.metrics.serve(cache)                    # /metrics where cache.config.metrics says
registry.register(pagemgr.metrics.collector(cache))      # or in a registry that the engine serves already
"""

from .collector import PoolCollector, collector
from .metric import Metric, Pool
from .names import METRICS, bytes_by_cause
from .server import Server, serve

__all__ = ["METRICS", "Metric", "Pool", "PoolCollector", "Server", "bytes_by_cause", "collector", "serve"]
