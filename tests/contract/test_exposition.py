"""What a scraper receives, read by parsers that are not ours."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import pagemgr
from pagemgr.metrics import METRICS, collector


def make_cache(pool: str) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 2, "num_kv_heads": 1, "head_dim": 8},
            pool={"num_blocks": 12, "block_size": 4, "host_blocks": 8},
            device="cpu",
            metrics={"pool": pool},
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
def registry() -> CollectorRegistry:
    """Two pools with awkward names, one of them used."""
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
    assert {sample.name for sample in samples} == set(METRICS)
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


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, Prometheus's own linter, is not installed")
def test_promtool_has_nothing_to_say(registry: CollectorRegistry) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
