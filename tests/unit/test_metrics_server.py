"""/metrics over HTTP: where it listens, what it says, and how it stops."""

from __future__ import annotations

import socket
from http.client import HTTPConnection

import pytest
from prometheus_client import CollectorRegistry, Counter

import pagemgr
from pagemgr.errors import ConfigError, OperatingError
from pagemgr.metrics import Server, serve


def make_cache(
    pool: str = "default", port: int | None = 0, host: str = "127.0.0.1", vllm_names: bool = False
) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 1, "num_kv_heads": 1, "head_dim": 8},
            pool={"num_blocks": 6, "block_size": 4},
            device="cpu",
            metrics={"pool": pool, "port": port, "host": host, "vllm_names": vllm_names},
        )
    )


def get(server: Server, path: str = "/metrics") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_it_serves_the_state_at_the_time_of_the_scrape() -> None:
    cache = make_cache()
    with serve(cache) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        status, before = get(server)
        cache.add()
        _, after = get(server)
    assert status == 200
    assert 'pagemgr_sequences{pool="default",tier="device"} 0.0' in before
    assert 'pagemgr_sequences{pool="default",tier="device"} 1.0' in after
    labels = f'backend="{cache.backend.name}",device="cpu",dtype="float32",pool="default"'
    assert f"pagemgr_backend_info{{{labels}}} 1.0" in after


def test_one_metric_can_be_asked_for() -> None:
    with serve(make_cache()) as server:
        _, text = get(server, "/metrics?name[]=pagemgr_up")
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['pagemgr_up{pool="default"} 1.0']


def test_it_listens_on_loopback_alone() -> None:
    with serve(make_cache()) as server, socket.socket() as other:
        # The wildcard address would be taken on every interface; a second loopback address is free only if ours is one.
        other.bind(("127.0.0.2", server.port))
        assert server.host == "127.0.0.1"


def test_a_port_in_use_is_named() -> None:
    with serve(make_cache()) as first:
        registry = CollectorRegistry()
        with pytest.raises(OperatingError, match=rf"127\.0\.0\.1:{first.port}: .*in use.*metrics\.port"):
            serve(make_cache(port=first.port), registry=registry)
        assert list(registry.collect()) == []  # and the registry is as it was
        assert get(first)[0] == 200


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:0"):
        serve(make_cache(host="192.0.2.1"))


def test_without_a_port_it_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.port is not set"):
        serve(make_cache(port=None))


def test_closing_frees_the_port_and_may_be_repeated() -> None:
    server = serve(make_cache())
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        get(server)
    with serve(make_cache(port=server.port)) as again:
        assert again.port == server.port


def test_it_stands_beside_the_metrics_of_the_engine() -> None:
    registry = CollectorRegistry()
    Counter("engine_requests", "Requests.", registry=registry).inc(3)
    with serve(make_cache("target"), make_cache("draft"), registry=registry) as server:
        _, text = get(server)
    assert "engine_requests_total 3.0" in text
    assert 'pagemgr_up{pool="target"} 1.0' in text
    assert 'pagemgr_up{pool="draft"} 1.0' in text


@pytest.mark.parametrize("vllm_names", [False, True])
def test_names_with_a_colon_arrive_whole(vllm_names: bool) -> None:
    with serve(make_cache("other"), make_cache(vllm_names=vllm_names)) as server:
        _, text = get(server)
    assert ('vllm:kv_cache_usage_perc{engine="0",model_name="default"} 0.0' in text) == vllm_names
    assert text.endswith("# EOF\n") != vllm_names  # OpenMetrics, but for these names
