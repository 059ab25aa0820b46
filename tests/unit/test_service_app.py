"""The API tells the truth, mounts anywhere, starts from a cache, and does nothing without the token."""

from __future__ import annotations

import hmac
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.types import ASGIApp

import pagemgr
from pagemgr.config import Config
from pagemgr.errors import ConfigError
from pagemgr.metrics import METRICS, bytes_by_cause, collector
from pagemgr.service import Workload, app, listener, reader, serve
from pagemgr.service.documents import DOCUMENTS
from pagemgr.sources import leaves
from tests.serving import SECRET_TOKEN, TENANT, TOKEN, ask, document, make_cache, run, use

SECRET = re.compile(r"token$|secret|password|salt|credential|_key$")


@pytest.fixture
def cache() -> pagemgr.PagedKVCache:
    cache = make_cache(token=TOKEN)
    use(cache)
    return cache


@pytest.fixture
def server(cache: pagemgr.PagedKVCache) -> ASGIApp:
    """The application by itself; what its server adds is tested further down and in ``test_service_abuse``."""
    return app(cache)


# It tells the truth -------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_cache(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    said, stats = document(server, "stats"), cache.stats()
    assert said["utilization"] == stats.device.utilization == 3 / 39
    assert said["bytes"] == bytes_by_cause(stats.device, cache.layout.block_bytes)
    assert sum(said["bytes"].values()) == said["capacity_bytes"] == 40 * cache.layout.block_bytes
    assert said["saved_bytes"] == 6 * cache.layout.block_bytes
    assert said["sequences"] == 4
    assert said["counters"]["swapped_sequences"] == {"out": 1, "in": 0}
    assert said["backend"] == cache.backend.name


def test_tiers_sequences_and_blocks(server: ASGIApp) -> None:
    tiers = {tier["name"]: tier for tier in document(server, "tiers")["tiers"]}
    assert (tiers["device"]["cached"], tiers["device"]["sequences"]) == (3, 3)
    assert (tiers["host"]["full"], tiers["host"]["open"], tiers["host"]["sequences"]) == (1, 1, 1)
    found = document(server, "sequences?limit=2")
    assert found["total"] == 4
    assert [one["tokens"] for one in found["largest"]] == [10, 10]
    assert [family["sequences"] for family in found["prefixes"]] == [3]
    device, host = document(server, "blocks?cells=10")["tiers"]
    assert (device["blocks_per_cell"], host["blocks_per_cell"]) == (4, 2)
    assert sum(map(sum, device["counts"])) == 40


def test_history_grows_without_anybody_looking(cache: pagemgr.PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "HISTORY_SECONDS", 0.01)
    monkeypatch.setattr("pagemgr.service.application.HISTORY_SECONDS", 0.01)
    with serve(cache) as server:
        deadline = time.monotonic() + 10
        while len(points := document(server, "history")["points"]) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(points) >= 5
    assert points[0]["utilization"] == round(cache.stats().device.utilization, 6)
    assert [point["time"] for point in points] == sorted(point["time"] for point in points)


def test_a_crowd_costs_the_pool_one_look(cache: pagemgr.PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = reader.take
    monkeypatch.setattr(reader, "take", lambda *args: taken.append(1) or real(*args))
    monkeypatch.setattr(reader, "SHARED_SECONDS", 60.0)
    one = reader.Reader(cache)
    crowd = [threading.Thread(target=one.look) for _ in range(50)]
    for viewer in crowd:
        viewer.start()
    for viewer in crowd:
        viewer.join()
    assert taken == [1]


def test_events_are_told_in_runs_newest_first_and_without_names(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    assert document(server, "events") == {"events": []}  # what was before is not told
    for start in (0, 50):
        sequence = cache.add([SECRET_TOKEN, *range(start, start + 11)])
        run(cache, sequence, [SECRET_TOKEN, *range(start, start + 11)])
        cache.free([sequence])
    cache.clear()
    runs = document(server, "events")["events"]
    assert [(one["kind"], one["reason"], one["tier"], one["blocks"]) for one in runs] == [
        ("removed", "cleared", "device", 9),
        ("stored", "computed", "device", 6),
    ]
    assert (runs[1]["first"], runs[1]["last"], runs[0]["first"]) == (1, 2, 3)
    assert all(one.keys() == {"first", "last", "kind", "reason", "tier", "target", "blocks"} for one in runs)


def test_the_manager_makes_events_only_while_somebody_asks(
    cache: pagemgr.PagedKVCache, server: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "IDLE_SECONDS", 0.4)
    assert not cache.manager.events.heard
    document(server, "stats")
    assert not cache.manager.events.heard
    document(server, "events")
    assert cache.manager.events.heard
    deadline = time.monotonic() + 10
    while cache.manager.events.heard and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not cache.manager.events.heard
    document(server, "events")
    assert cache.manager.events.heard


def test_lost_events_are_told(cache: pagemgr.PagedKVCache, server: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_WAITING", 2)
    document(server, "events")
    for start in range(0, 30, 10):
        sequence = cache.add(range(start, start + 6))
        run(cache, sequence, list(range(start, start + 6)))
        cache.free([sequence])
    runs = document(server, "events")["events"]
    assert [one["reason"] for one in runs] == ["more than 2 events at once, which are not told", "computed"]
    assert runs[1]["blocks"] == 2
    cache.clear()
    assert document(server, "events")["events"][0]["reason"] == "cleared"


def test_metrics_are_those_of_the_collector(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    status, headers, text = ask(server, "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")} == set(METRICS)
    _, headers, text = ask(server, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    _, _, text = ask(server, "/metrics?name[]=pagemgr_up")
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['pagemgr_up{pool="default"} 1.0']


def test_the_registry_of_the_engine_is_served(cache: pagemgr.PagedKVCache) -> None:
    registry = CollectorRegistry()
    registry.register(collector(cache))
    Counter("engine_requests", "Requests.", registry=registry).inc(3)
    _, _, text = ask(app(cache, registry=registry), "/metrics")
    assert "engine_requests_total 3.0" in text
    assert "pagemgr_up" in text


def test_bad_queries_name_what_is_allowed(server: ASGIApp) -> None:
    for query in ("cells=0", "cells=-1", "cells=x", "cells=999999999999999999999", "cells=", "cells=%D9%A3"):
        status, _, text = ask(server, f"/api/v1/blocks?{query}")
        assert status == 400, query
        assert "cells must be a whole number from 1 to 16384" in json.loads(text)["error"]


# Health -------------------------------------------------------------------------------------------------------------


def test_ready_until_a_check_fails(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    assert ask(server, "/readyz")[0] == 200
    cache.manager.counters.invariant_violations = 1
    status, _, text = ask(server, "/readyz")
    assert (status, json.loads(text)) == (503, {"ready": False, "reasons": ["1 checks of the pool failed"]})
    assert ask(server, "/healthz")[::2] == (200, "ok\n")


def test_a_stuck_pool_is_alive_but_not_ready(
    cache: pagemgr.PagedKVCache, server: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagemgr.service.application.READY_SECONDS", 0.05)
    with cache.manager._lock:
        status, _, text = ask(server, "/readyz")
        assert ask(server, "/healthz")[0] == 200
    assert status == 503
    assert "did not answer within 0.05 s" in text


def test_a_failed_workload_is_not_ready_but_can_be_looked_at(cache: pagemgr.PagedKVCache) -> None:
    def steps() -> Iterator[None]:
        yield
        raise RuntimeError(str(SECRET_TOKEN))

    with Workload(steps(), "broken") as workload:
        server = app(cache, workload=workload)
        deadline = time.monotonic() + 10
        while workload.state != "failed" and time.monotonic() < deadline:
            time.sleep(0.01)
        status, _, text = ask(server, "/readyz")
        assert document(server, "stats")["sequences"] == 4
    assert (status, json.loads(text)["reasons"]) == (503, ["the workload failed: RuntimeError"])


# Who may do what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["check", "dump"])
def test_nothing_is_done_without_the_token(server: ASGIApp, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = f"/api/v1/{name}"
    for header in ({}, {"authorization": "Bearer x"}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}):
        status, headers, _ = ask(server, path, "POST", **header)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert TOKEN not in caplog.text
    assert ask(server, path)[0] == 405  # a link cannot do it
    assert ask(server, path, "POST", authorization=f"Bearer {TOKEN}")[0] == 200


def test_without_a_token_in_the_settings_nothing_can_be_done() -> None:
    for header in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
        status, _, text = ask(app(make_cache()), "/api/v1/check", "POST", **header)
        assert status == 403
        assert "set service.token" in text


def test_the_token_is_compared_in_constant_time(server: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for given in ("", "Bearer x", "Bearer " + "é" * 40, f"Bearer {TOKEN}"):
        ask(server, "/api/v1/check", "POST", authorization=given)
    assert len(compared) == 4
    assert {len(value) for pair in compared for value in pair} == {32}  # digests: not even the length shows


def test_the_token_is_in_no_answer(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    assert document(server, "config")["service"]["token"] == "**********"
    assert TOKEN not in everything(server)
    assert TOKEN not in repr(cache.config)


def test_every_secret_of_the_settings_is_masked() -> None:
    named = {key: field for key, field in leaves(Config) if SECRET.search(key)}
    assert named.keys() >= {"service.token", "prefix.secret"}
    for key, field in named.items():
        assert "SecretStr" in repr(field.annotation), f"{key} would be told by /api/v1/config"


@pytest.mark.parametrize("token", ["2short", "with a space in it ok", "ümläuts-are-not-ascii"])
def test_a_token_that_can_be_guessed_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.token.*at least 16 visible ASCII") as refused:
        make_cache(token=token)
    assert token not in str(refused.value)


def test_check_and_dump(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    bearer = f"Bearer {TOKEN}"
    _, _, text = ask(server, "/api/v1/check", "POST", authorization=bearer)
    assert json.loads(text) == {"sound": True, "problem": None}
    _, _, text = ask(server, "/api/v1/dump", "POST", authorization=bearer)
    assert json.loads(text)["tiers"][0]["state"] == cache.manager.tiers[0].pool.state.tolist()
    cache.manager.tiers[0].pool.published[39] = True
    _, _, text = ask(server, "/api/v1/check", "POST", authorization=bearer)
    assert json.loads(text)["sound"] is False
    assert cache.stats().counters.invariant_violations == 1


def test_the_workload_pauses_and_goes_on(cache: pagemgr.PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagemgr.service.runner.STEP_SECONDS", 0.001)
    taken: list[int] = []

    def steps() -> Iterator[None]:
        while True:
            taken.append(1)
            yield

    with Workload(steps(), "counting") as workload:
        server = app(cache, workload=workload)
        assert ask(server, "/api/v1/pause", "POST", authorization=f"Bearer {TOKEN}")[0] == 200
        time.sleep(0.05)
        paused = len(taken)
        time.sleep(0.1)
        assert (workload.state, len(taken)) == ("paused", paused)
        ask(server, "/api/v1/resume", "POST", authorization=f"Bearer {TOKEN}")
        deadline = time.monotonic() + 10
        while len(taken) < paused + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(taken) >= paused + 3
    assert workload.state == "ended"


def everything(server: ASGIApp) -> str:
    """Every answer there is, dump included."""
    reads = [ask(server, path)[2] for path in ("/ui", "/metrics", "/healthz", "/readyz", "/nothing")]
    reads += [ask(server, f"/api/v1/{name}")[2] for name in DOCUMENTS]
    return "\n".join(
        [*reads, *(ask(server, f"/api/v1/{n}", "POST", authorization=f"Bearer {TOKEN}")[2] for n in ("check", "dump"))]
    )


def test_neither_token_ids_nor_names_nor_tenants_leave(cache: pagemgr.PagedKVCache, server: ASGIApp) -> None:
    text = everything(server)
    assert str(SECRET_TOKEN) not in text
    assert TENANT not in text
    root = pagemgr.Namespace(tenant=TENANT).root(4)
    assert root.hex() not in text
    for name in cache.manager.tiers[0].index.names:
        assert not name.any() or bytes(name).hex() not in text


# Where it runs ------------------------------------------------------------------------------------------------------


def test_it_mounts_into_an_application_that_is_there(cache: pagemgr.PagedKVCache) -> None:
    theirs = Starlette()
    theirs.mount("/kv", app(cache))
    status, headers, text = ask(theirs, "/kv/ui")
    assert (status, "script-src 'sha256-" in headers["content-security-policy"]) == (200, True)
    assert "fetch(`api/v1/${name}`" in text  # relative to where it is mounted
    assert document(theirs, "stats", under="/kv")["sequences"] == 4
    assert ask(theirs, "/kv/api/v1/check", "POST")[0] == 401
    assert ask(theirs, "/kv/")[1]["location"] == "ui"


def test_the_loggers_of_another_uvicorn_are_left_alone(cache: pagemgr.PagedKVCache) -> None:
    before = {name: vars(logging.getLogger(name)).copy() for name in ("uvicorn", "uvicorn.access", "uvicorn.error")}
    with serve(cache) as server:
        ask(server, "/healthz")
    for name, values in before.items():
        after = vars(logging.getLogger(name))
        assert {key: after[key] for key in ("level", "handlers", "propagate", "disabled")} == {
            key: values[key] for key in ("level", "handlers", "propagate", "disabled")
        }


def test_closing_frees_the_port_and_may_be_repeated(cache: pagemgr.PagedKVCache) -> None:
    server = cache.serve()
    assert server.url == f"http://127.0.0.1:{server.port}/ui"
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "/healthz")
    with cache.serve(port=server.port) as again:
        assert again.port == server.port
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{server.port}: .*in use.*service\.port"):
            cache.serve(port=server.port)


def test_it_listens_on_loopback_alone_unless_told(
    cache: pagemgr.PagedKVCache, caplog: pytest.LogCaptureFixture
) -> None:
    with cache.serve() as server, socket.socket() as other:
        other.bind(("127.0.0.2", server.port))  # would be taken by the wildcard address
    assert not caplog.records
    with serve(cache, host="0.0.0.0"):
        assert "can read the state of the pool" in caplog.text
