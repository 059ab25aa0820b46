"""The metrics that vLLM has a name for, under that name, for dashboards and routers made for it.

Only what means the same: requests that wait or run are the engine's to count, not the pool's. Names as of vLLM 0.11
(vllm/v1/metrics/loggers.py), those that it deprecated included, as dashboards still ask for them.
"""

from __future__ import annotations

from pagemgr.stats import Stats

from .metric import Metric, Pool, Reading, counter, one
from .names import DEVICE


def identity(pool: Pool) -> dict[str, str]:
    """The labels that vLLM gives to every metric."""
    return {"model_name": pool.name, "engine": "0"}


def _host_usage(stats: Stats) -> float:
    return next((tier.utilization for tier in stats.tiers if tier.name != DEVICE), 0.0)


def _swapped(stats: Stats) -> int:
    return sum(tier.sequences for tier in stats.tiers if tier.name != DEVICE)


def _config(pool: Pool, stats: Stats) -> list[Reading]:
    host = sum(tier.num_blocks for tier in stats.tiers if tier.name != DEVICE)
    return [((str(stats.device.block_size), pool.dtype, str(stats.device.num_blocks), str(host)), 1)]


_QUERIES = "Prefix cache queries, in tokens."
_HITS = "Prefix cache hits, in tokens."

ALIASES: tuple[Metric, ...] = (
    Metric("vllm:kv_cache_usage_perc", "0 to 1", (), "KV cache usage.", one(lambda s: s.device.utilization)),
    Metric("vllm:gpu_cache_usage_perc", "0 to 1", (), "KV cache usage.", one(lambda s: s.device.utilization)),
    Metric("vllm:cpu_cache_usage_perc", "0 to 1", (), "KV cache usage of the host tier.", one(_host_usage)),
    Metric("vllm:num_requests_swapped", "requests", (), "Sequences swapped to the host.", one(_swapped)),
    Metric("vllm:prefix_cache_queries_total", "tokens", (), _QUERIES, counter(lambda c: c.prefix_query_tokens)),
    Metric("vllm:prefix_cache_hits_total", "tokens", (), _HITS, counter(lambda c: c.prefix_hit_tokens)),
    Metric("vllm:gpu_prefix_cache_queries_total", "tokens", (), _QUERIES, counter(lambda c: c.prefix_query_tokens)),
    Metric("vllm:gpu_prefix_cache_hits_total", "tokens", (), _HITS, counter(lambda c: c.prefix_hit_tokens)),
    Metric(
        "vllm:cache_config_info",
        "",
        ("block_size", "cache_dtype", "num_gpu_blocks", "num_cpu_blocks"),
        "Sizes of the pool.",
        _config,
    ),
)
