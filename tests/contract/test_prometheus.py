"""Prometheus itself, on live pools: its linters pass, queries find data, alerts fire when provoked and only then."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml

import pagemgr
from pagemgr.errors import InternalError, OutOfBlocks
from pagemgr.metrics import Server, serve
from pagemgr.metrics.dashboard import dashboard
from pagemgr.metrics.shipped import rules_yaml, write_stack
from tests.prometheus import RATE, Prometheus, running, wait_for

missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed; on Debian: apt install prometheus"),
    pytest.mark.xdist_group("prometheus"),  # one server for all of them
]

RULES = [rule for group in yaml.safe_load(rules_yaml())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"] for rule in RULES if "alert" in rule}


def make_cache(pool: str, vllm_names: bool = False) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 1, "num_kv_heads": 1, "head_dim": 16},
            pool={"num_blocks": 40, "block_size": 4, "host_blocks": 60, "host_cache": "inclusive", "max_sequences": 16},
            device="cpu",
            backend="torch",
            metrics={"pool": pool, "port": 0, "vllm_names": vllm_names},
        )
    )


def run(cache: pagemgr.PagedKVCache, sequences: list[pagemgr.Sequence], tokens: list[list[int]]) -> None:
    with cache.step(sequences, tokens) as step:
        new = torch.randn(step.plan.num_tokens, 1, 16)
        step.attention(0, new, new, new)
        step.commit()


class Engine(threading.Thread):
    """Does a little of everything, again and again, and leaves nothing behind."""

    def __init__(self, cache: pagemgr.PagedKVCache) -> None:
        super().__init__()
        self.cache = cache
        self.error: BaseException | None = None
        self._stop_now = threading.Event()

    def run(self) -> None:
        parked = [self.cache.add() for _ in range(6)]
        run(self.cache, parked, [[1]] * 6)
        try:
            for turn in count():
                if self._stop_now.wait(0.01):
                    return
                self._turn(turn)
        except BaseException as error:
            self.error = error

    def _turn(self, turn: int) -> None:
        cache, system, own, earlier = (
            self.cache,
            range(20),
            *(range(n, n + 10) for n in (99 + 17 * turn, 17 * turn - 71)),
        )
        if turn > 10:  # what was cached then is on the host by now
            again = cache.add([*system, *earlier])
            run(cache, [again], [[*system, *earlier][again.num_cached_tokens :]])
            cache.free([again])
        first = cache.add([*system, *own])
        run(cache, [first], [[*system, *own][first.num_cached_tokens :]])
        (fork,) = cache.fork(first)
        for token in range(9):
            run(cache, [first, fork], [[token], [token + 1]])
        if turn % 4 == 0:
            cache.swap_out([fork])
            cache.swap_in([fork])
        with cache.step([first], [[1]]):
            pass  # taken back
        if turn % 20 == 0:
            with suppress(OutOfBlocks):
                cache.step([first], [[0] * 110])
        cache.free([first, fork])

    def end(self) -> None:
        self._stop_now.set()
        self.join()
        if self.error is not None:
            raise self.error


class LostDevice:
    def query(self) -> bool:
        raise RuntimeError("the device is gone")


@pytest.fixture(scope="module")
def caches() -> dict[str, pagemgr.PagedKVCache]:
    return {name: make_cache(name) for name in ("busy", "full", "leaky", "wrong", "lost")}


@pytest.fixture(scope="module")
def engine(caches: dict[str, pagemgr.PagedKVCache]) -> Iterator[Engine]:
    engine = Engine(caches["busy"])
    engine.start()
    yield engine
    engine.end()


@pytest.fixture(scope="module")
def servers(caches: dict[str, pagemgr.PagedKVCache]) -> Iterator[tuple[Server, Server]]:
    """Two processes' worth of pools."""
    with serve(*caches.values()) as first, serve(make_cache("other", vllm_names=True)) as second:
        yield first, second


@pytest.fixture(scope="module")
def prometheus(
    engine: Engine, servers: tuple[Server, Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus") / "stack"
    write_stack(folder)
    with running(folder, rules_yaml(), [f"127.0.0.1:{server.port}" for server in servers]) as prometheus:
        wait_for(lambda: prometheus.query(f"rate(pagemgr_steps_committed_total[{RATE}]) > 0"), "a running engine")
        yield prometheus


# On live pools ------------------------------------------------------------------------------------------------------


def panel_queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def test_every_query_of_every_panel_finds_data(prometheus: Prometheus) -> None:
    for title, query in panel_queries():
        for variable in ("$job", "$instance", "$pool"):
            query = query.replace(variable, ".*")
        query = query.replace("$__rate_interval", RATE)

        def has_data(query: str = query) -> bool:
            values = prometheus.values(query)
            return bool(values) and all(map(math.isfinite, values))

        wait_for(has_data, f"{title}: {query}")


def test_every_variable_of_the_dashboard_finds_its_choices(prometheus: Prometheus) -> None:
    variables = [variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable]
    for definition in variables:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition).groups()  # type: ignore[union-attr]
        assert prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": metric}), definition


def test_every_recorded_series_has_data_and_every_rule_is_healthy(prometheus: Prometheus) -> None:
    groups = prometheus.get("/api/v1/rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in found} == {rule.get("record") or rule["alert"] for rule in RULES}
    for rule in found:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            wait_for(lambda name=rule["name"]: any(map(math.isfinite, prometheus.values(name))), rule["name"])


def test_every_series_that_an_alert_looks_at_exists(prometheus: Prometheus) -> None:
    for rule in RULES:
        for selector in re.findall(r"\b(?:pagemgr[\w:]+|up)(?:\{[^}]*\})?", rule["expr"]):
            assert prometheus.query(selector), f"{rule}: {selector}"


def test_exemplars_are_stored(prometheus: Prometheus) -> None:
    now = time.time()
    found = prometheus.get(
        "/api/v1/query_exemplars", query="pagemgr_swap_seconds_bucket", start=str(now - 60), end=str(now)
    )
    assert {exemplar["labels"]["blocks"] for series in found for exemplar in series["exemplars"]} <= set(
        map(str, range(12))
    )
    assert found


def test_what_prometheus_holds_is_what_the_pool_says(
    prometheus: Prometheus, caches: dict[str, pagemgr.PagedKVCache]
) -> None:
    cache = caches["full"]  # which nobody uses yet
    (capacity,) = prometheus.values('pagemgr_pool_capacity_bytes{pool="full", tier="device"}')
    assert capacity == 40 * cache.layout.block_bytes
    assert prometheus.values('pagemgr_blocks{pool="full", tier="device", state="free"}') == [39]
    by_cause = "sum by (job, instance, pool, tier) (pagemgr_pool_bytes)"
    differences = prometheus.values(f"{by_cause} - pagemgr_pool_capacity_bytes")
    assert differences == [0] * 12  # device and host of six pools


def test_names_of_vllm_arrive_with_their_colons(prometheus: Prometheus) -> None:
    assert prometheus.values('vllm:kv_cache_usage_perc{model_name="other"}') == [0]
    assert prometheus.values('rate(vllm:prefix_cache_queries_total{model_name="other"}[3s])') == [0]


def test_alerts_fire_when_provoked_and_not_otherwise(
    prometheus: Prometheus, servers: tuple[Server, Server], caches: dict[str, pagemgr.PagedKVCache]
) -> None:
    wait_for(lambda: not prometheus.firing(), "no alert")

    caches["full"].step([caches["full"].add()], [range(39 * 4)]).commit()

    leaky = caches["leaky"]
    gone = leaky.add(range(8))
    run(leaky, [gone], [[*range(8)]])
    leaky.manager.tiers[0].pool.acquire(leaky.manager.table.blocks[0, :2].copy())  # a reference that nobody drops
    leaky.free([gone])

    wrong = caches["wrong"].manager
    wrong.tiers[0].pool.refs[3] = 1
    with pytest.raises(InternalError):
        wrong.check()

    lost = caches["lost"]
    lost.free([lost.add()])
    sequence = lost.add(range(4))
    run(lost, [sequence], [[*range(4)]])
    lost.free([sequence], after=LostDevice())

    servers[1].close()
    expected = {
        ("PagemgrPoolFull", "full"),
        ("PagemgrBlockLeak", "leaky"),
        ("PagemgrInvariantViolated", "wrong"),
        ("PagemgrPoolUnreadable", "lost"),
        ("PagemgrTargetDown", "target"),
    }
    # The full pool's sequence lives and nothing runs; what is told after half an hour is told in the same moment here.
    wait_for(lambda: prometheus.firing() - {("PagemgrSequencesForgotten", "full")} == expected, f"just {expected}")
    for alert in prometheus.get("/api/v1/alerts")["alerts"]:
        told = alert["annotations"]["summary"] + alert["annotations"]["description"]
        assert "{{" not in told
        assert "<no value>" not in told
        assert "<error" not in told


# By Prometheus' own tools -------------------------------------------------------------------------------------------


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_config_and_rules(tmp_path: Path) -> None:
    write_stack(tmp_path / "stack")
    assert "SUCCESS" in promtool("check", "config", tmp_path / "stack" / "prometheus.yaml")
    assert f"SUCCESS: {len(RULES)} rules found" in promtool(
        "check", "rules", "--lint=all", "--lint-fatal", tmp_path / "stack" / "rules" / "pagemgr.yaml"
    )


WELL = {
    "up{}": "1+0x90",
    "pagemgr_up{}": "1+0x90",
    "pagemgr_invariant_violations_total{}": "0+0x90",
    'pagemgr_unaccounted_bytes{tier="device"}': "0+0x90",
    'pagemgr_blocks{tier="device",state="null"}': "1+0x90",
    'pagemgr_blocks{tier="device",state="free"}': "30+0x90",
    'pagemgr_blocks{tier="device",state="open"}': "30+0x90",
    'pagemgr_blocks{tier="device",state="full"}': "30+0x90",
    'pagemgr_blocks{tier="device",state="cached"}': "10+0x90",
    'pagemgr_blocks{tier="device",state="fenced"}': "0 1 0 0 2 0+0x85",
    'pagemgr_blocks{tier="host",state="full"}': "50+0x90",
    'pagemgr_blocks{tier="host",state="free"}': "50+0x90",
    'pagemgr_sequences{tier="device"}': "20+0x90",
    'pagemgr_sequences{tier="host"}': "5+0x90",
    "pagemgr_steps_in_flight{}": "1+0x90",
    "pagemgr_steps_committed_total{}": "0+600x90",
    "pagemgr_steps_aborted_total{}": "0+1x90",
    'pagemgr_allocation_failures_total{reason="out_of_blocks"}': "0+30x90",
    'pagemgr_swap_failures_total{direction="out"}': "0+0x90",
    "pagemgr_host_cache_failures_total{}": "0+0x90",
    "pagemgr_prefix_collisions_total{}": "0+0x90",
    'pagemgr_pool_bytes{tier="device",cause="pinned"}': "500+0x90",
    'pagemgr_pool_bytes{tier="device",cause="full"}': "2500+0x90",
    'pagemgr_swap_sequences_total{direction="in"}': "0+10x90",
    'pagemgr_swap_seconds_bucket{direction="in",le="1.0"}': "0+10x90",
    'pagemgr_swap_seconds_bucket{direction="in",le="2.0"}': "0+10x90",
    'pagemgr_swap_seconds_bucket{direction="in",le="+Inf"}': "0+10x90",
}
"""A pool that is well, minute by minute: some pressure, a few refusals and swaps."""

IDLE = {"pagemgr_steps_committed_total{}": "0+600x10 6000+0x80", "pagemgr_steps_in_flight{}": "0+0x90"} | {
    name: "100+0x90" for name in WELL if "aborted" in name or "failures_total" in name or "swap_se" in name
}
"""What is different where an engine has ended, or hangs."""

NOBODY = {'pagemgr_sequences{tier="device"}': "0+0x90", 'pagemgr_sequences{tier="host"}': "0+0x90"}

HEALTHY: dict[str, dict[str, str]] = {
    "well": {},
    "waiting": IDLE | NOBODY | {'pagemgr_pool_bytes{tier="device",cause="full"}': "0+0x90"},  # and keeps what is pinned
}

ILL = {
    "PagemgrTargetDown": {"up{}": "1x40 0x50"},
    "PagemgrPoolUnreadable": {"pagemgr_up{}": "1x40 0x50"},
    "PagemgrInvariantViolated": {"pagemgr_invariant_violations_total{}": "0x40 1x50"},
    "PagemgrBlockLeak": IDLE | NOBODY,
    "PagemgrPoolFull": {'pagemgr_blocks{tier="device",state="full"}': "1000+0x90"},
    "PagemgrHostTierFull": {'pagemgr_blocks{tier="host",state="full"}': "1000+0x90"},
    "PagemgrRefusals": {'pagemgr_allocation_failures_total{reason="out_of_blocks"}': "0+61x90"},
    "PagemgrSequencesForgotten": IDLE,
    "PagemgrStepStuck": IDLE | {"pagemgr_steps_in_flight{}": "1+0x90"},
    "PagemgrFenceStuck": IDLE | {'pagemgr_blocks{tier="device",state="fenced"}': "2+0x90"},
    "PagemgrPrefixCollision": {"pagemgr_prefix_collisions_total{}": "0x40 1x50"},
    "PagemgrMovesFailing": {'pagemgr_swap_failures_total{direction="out"}': "0+0x80 1+0x9"},
    "PagemgrSwapSlow": {'pagemgr_swap_seconds_bucket{direction="in",le="1.0"}': "0+9x90"},
    "PagemgrSwapThrash": {'pagemgr_swap_sequences_total{direction="in"}': "0+25x90"},
}
ALSO = {"PagemgrStepStuck": {"PagemgrSequencesForgotten"}, "PagemgrFenceStuck": {"PagemgrSequencesForgotten"}}
"""What fires besides, as a consequence."""


def series(pool: str, changes: dict[str, str]) -> list[dict[str, str]]:
    """What is scraped of a pool that is well but for these."""
    assert changes.keys() <= WELL.keys()
    labels = f',job="pagemgr",instance="a:1",pool="{pool}"}}'
    return [
        {"series": name.replace("}", labels).replace("{,", "{"), "values": values}
        for name, values in (WELL | changes).items()
    ]


def test_every_alert_fires_for_its_reason_and_for_no_other(tmp_path: Path) -> None:
    assert ILL.keys() == ALERTS
    write_stack(tmp_path / "stack")
    expected = [
        (name, pool) for pool in ILL for name in {pool} | ALSO.get(pool, set())
    ]  # pools named for their illness
    test = {
        "interval": "1m",
        "input_series": [one for pool, changes in (HEALTHY | ILL).items() for one in series(pool, changes)],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname, pool) (ALERTS{alertstate="firing"})',
                "eval_time": "85m",
                "exp_samples": [
                    {"labels": f'{{alertname="{name}", pool="{pool}"}}', "value": 1} for name, pool in expected
                ],
            }
        ],
    }
    tests = {"rule_files": ["stack/rules/pagemgr.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "tests.yaml").write_text(json.dumps(tests))
    promtool("test", "rules", tmp_path / "tests.yaml")
