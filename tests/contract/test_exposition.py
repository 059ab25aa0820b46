"""What a scraper receives, read by parsers that are not ours."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import pagemgr
from pagemgr.metrics import METRICS, collector
from pagemgr.timings import ONE_IN

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def make_cache(pool: str, **metrics: object) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 2, "num_kv_heads": 1, "head_dim": 8},
            pool={"num_blocks": 12, "block_size": 4, "host_blocks": 8},
            device="cpu",
            metrics={"pool": pool, **metrics},
        )
    )


def use(cache: pagemgr.PagedKVCache) -> None:
    """A prompt, a fork that writes to a shared block, a swap."""
    sequence = cache.add(range(10))
    for sequences, tokens in (([sequence], [range(10)]), ([*fork_of(cache, sequence)], [[1], [2]])):
        with cache.step(sequences, tokens) as step:
            for layer in range(2):
                new = torch.randn(step.plan.num_tokens, 1, 8)
                step.attention(layer, new, new, new)
            step.commit()
    cache.swap_out([sequence])


def fork_of(cache: pagemgr.PagedKVCache, sequence: pagemgr.Sequence) -> list[pagemgr.Sequence]:
    return [sequence, *cache.fork(sequence)]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """Two pools with awkward names, one of them used, and all of it timed."""
    monkeypatch.setitem(ONE_IN, "step", 1)
    used, idle = make_cache('a "quoted"\\name'), make_cache("ein Becken")
    use(used)
    registry = CollectorRegistry()
    registry.register(collector(used, idle))
    return registry


def test_the_text_format_parses_and_agrees_with_the_state(registry: CollectorRegistry) -> None:
    text = generate_latest(registry).decode()
    check(list(parse_text(text)), text)


def test_the_openmetrics_format_parses_and_agrees_with_the_state(registry: CollectorRegistry) -> None:
    text = generate_openmetrics(registry).decode()
    check(list(parse_openmetrics(text)), text)  # refuses clashing names, wrong suffixes and repeated families


def check(families: list[Metric], text: str) -> None:
    headers = Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(headers.values()) == {1}
    samples = [sample for family in families for sample in family.samples]
    parts = ("_bucket", "_count", "_sum")
    timed = {name + part for name in METRICS if METRICS[name].kind == "histogram" for part in parts}
    plain = {name for name in METRICS if METRICS[name].kind != "histogram"}
    assert {sample.name for sample in samples if not sample.name.endswith("_created")} == plain | timed
    assert all(family.documentation for family in families)
    assert {family.name: family.type for family in families if family.name == "pagemgr_pool_bytes"} == {
        "pagemgr_pool_bytes": "gauge"
    }
    assert all(family.type == "counter" for family in families if family.samples[0].name.endswith("_total"))
    for pool, blocks, swapped in (('a "quoted"\\name', 12, 1), ("ein Becken", 12, 0)):
        here = [sample for sample in samples if sample.labels.get("pool") == pool]
        device = [sample for sample in here if sample.labels.get("tier") == "device"]
        assert (
            sum(sample.value for sample in device if sample.name == "pagemgr_pool_bytes") == blocks * 2 * 2 * 8 * 4 * 4
        )
        moved = {
            sample.labels["direction"]: sample.value for sample in here if sample.name == "pagemgr_swap_sequences_total"
        }
        assert moved == {"out": swapped, "in": 0}


def test_exemplars_lead_from_a_duration_to_what_took_it(registry: CollectorRegistry) -> None:
    text = generate_openmetrics(registry).decode()
    exemplars = {
        sample.name: sample.exemplar
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert set(exemplars) == {f"pagemgr_{what}_seconds_bucket" for what in ("step", "kernel", "swap")}
    assert exemplars["pagemgr_step_seconds_bucket"].labels["step"] in ("1", "2")
    assert exemplars["pagemgr_swap_seconds_bucket"].labels == {"blocks": "3"}
    assert all(0 < exemplar.value < 60 for exemplar in exemplars.values())
    assert "# {" not in generate_latest(registry).decode()  # the older format has no room for them


def test_names_of_vllm_are_reported_if_asked_for() -> None:
    cache = make_cache("llama", vllm_names=True)
    use(cache)
    cache.add(range(10))
    registry = CollectorRegistry()
    registry.register(collector(cache, make_cache("other")))
    values = {
        sample.name: (sample.labels, sample.value)
        for family in parse_text(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }
    identity = {"model_name": "llama", "engine": "0"}
    sizes = {"block_size": "4", "cache_dtype": "float32", "num_gpu_blocks": "12", "num_cpu_blocks": "8"}
    stats = cache.stats()
    assert values == {
        "vllm:kv_cache_usage_perc": (identity, stats.device.utilization),
        "vllm:gpu_cache_usage_perc": (identity, stats.device.utilization),
        "vllm:cpu_cache_usage_perc": (identity, stats.tiers[1].utilization),
        "vllm:num_requests_swapped": (identity, 1),
        "vllm:prefix_cache_queries_total": (identity, 20),
        "vllm:prefix_cache_hits_total": (identity, 8),
        "vllm:gpu_prefix_cache_queries_total": (identity, 20),
        "vllm:gpu_prefix_cache_hits_total": (identity, 8),
        "vllm:cache_config_info": (identity | sizes, 1),
    }
    assert stats.tiers[1].utilization > 0


def by_wsgi(app: Callable[..., Any]) -> tuple[str, str]:
    environ: dict[str, Any] = {"HTTP_ACCEPT": OPENMETRICS}
    setup_testing_defaults(environ)
    told: dict[str, str] = {}
    body = b"".join(app(environ, lambda status, headers: told.update(headers, status=status)))
    assert told["status"].startswith("200")
    return told["Content-Type"], body.decode()


def by_asgi(app: Callable[..., Any]) -> tuple[str, str]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"accept", OPENMETRICS.encode())]
    asyncio.run(
        app({"type": "http", "method": "GET", "headers": headers, "query_string": b"", "path": "/"}, receive, send)
    )
    assert sent[0]["status"] == 200
    return dict(sent[0]["headers"])[b"Content-Type"].decode(), sent[1]["body"].decode()


@pytest.mark.parametrize(("make", "ask"), [(make_wsgi_app, by_wsgi), (make_asgi_app, by_asgi)])
def test_an_app_of_prometheus_client_serves_it(
    registry: CollectorRegistry, make: Callable[..., Any], ask: Callable[..., tuple[str, str]]
) -> None:
    kind, text = ask(make(registry))
    assert kind.startswith("application/openmetrics-text")
    check(list(parse_openmetrics(text)), text)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, Prometheus's own linter, is not installed")
def test_promtool_has_nothing_to_say(registry: CollectorRegistry) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
