"""The collector over a manager in many states: sums, counters, names, failures, threads, and what a scrape costs."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from pagemgr.errors import InvalidInput, OutOfBlocks, PagemgrError
from pagemgr.manager import BlockManager
from pagemgr.metrics import METRICS, Pool, PoolCollector, bytes_by_cause
from pagemgr.prefix import Namespace
from pagemgr.stats import Histogram, Stats
from pagemgr.timings import TIMED as KINDS

BLOCK_BYTES = 4 * 96
ALLOWED_LABELS = (
    {"pool", "tier", "state", "cause", "reason", "direction", "policy", "phase", "op"}
    | {"backend", "device", "dtype", "version", "python", "torch"}  # of the metrics that say what runs
)
TIMED = {name for name, metric in METRICS.items() if metric.kind == "histogram"}
"""What a cache reports and a manager alone does not."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def make_manager(prefix_caching: bool = True, host_cache: str = "off") -> BlockManager:
    return BlockManager(
        40,
        4,
        max_sequences=10,
        max_seq_len=60,
        num_host_blocks=24,
        prefix_caching=prefix_caching,
        host_cache=host_cache,
    )


def make_pool(manager: BlockManager, name: str = "default") -> Pool:
    return Pool(name, manager.stats, BLOCK_BYTES, "lru", "torch")


def scrape(collector: PoolCollector) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for (n, have), value in samples.items() if n == name and labels.items() <= dict(have).items())


def random_verbs(manager: BlockManager, seed: int, count: int) -> Iterator[None]:
    """Drive every verb, refusals included; yields after each, with steps and transfers left under way."""
    rng = np.random.default_rng(seed)
    live, steps, transfers = [], [], []

    def few_tokens(n: int) -> list[int]:
        return [int(rng.integers(2))] * n

    def one() -> None:
        some = [live[i] for i in rng.permutation(len(live))[:3]]
        match int(rng.integers(10)):
            case 0:
                live.append(manager.add(few_tokens(rng.integers(70))))
            case 1 | 2 if some:
                new = [few_tokens(n) if n % 3 else int(n) for n in rng.integers(1, 14, len(some))]
                steps.append(manager.reserve(some, new))
            case 3 | 4 if steps:
                manager.commit(steps.pop(0))
            case 5 if steps:
                manager.abort(steps[-1])
                steps.pop()
            case 6 if some:
                live.extend(manager.fork(some[0], int(rng.integers(1, 3))))
            case 7 if some:
                manager.truncate(some[:1], [int(rng.integers(0, 1 + manager.lengths(some[:1])[0]))])
            case 8 if some:
                manager.free(some[:1])
                live.remove(some[0])
            case 9 if some:
                begin = manager.swap_out if rng.integers(2) else manager.swap_in
                transfers.append(begin(some[:1]))
            case _ if transfers:
                (manager.cancel if rng.random() < 0.3 else manager.finish)(transfers.pop(0))

    for _ in range(count):
        with suppress(PagemgrError):
            one()
        yield


# Sums ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_bytes_by_cause_sum_to_the_capacity_in_every_state(seed: int) -> None:
    caching = seed % 3 > 0
    host_caches = ("off", "inclusive", "exclusive")
    manager = make_manager(caching, host_caches[seed // 3 % 3] if caching else "off")
    collector = PoolCollector(make_pool(manager))
    for _ in random_verbs(manager, seed, 120):
        manager.check()
        samples = scrape(collector)
        assert min(value for (name, _), value in samples.items()) >= 0
        for tier, blocks in (("device", 40), ("host", 24)):
            assert total(samples, "pagemgr_pool_bytes", tier=tier) == blocks * BLOCK_BYTES
            assert total(samples, "pagemgr_pool_capacity_bytes", tier=tier) == blocks * BLOCK_BYTES
            assert total(samples, "pagemgr_blocks", tier=tier) == blocks
            assert 0 <= total(samples, "pagemgr_pool_utilization_ratio", tier=tier) <= 1
            assert 0 <= total(samples, "pagemgr_internal_fragmentation_ratio", tier=tier) <= 1
        held = sum(
            total(samples, "pagemgr_pool_bytes", tier="device", cause=c) for c in ("full", "open_used", "tail_waste")
        )
        blocks = sum(total(samples, "pagemgr_blocks", tier="device", state=state) for state in ("full", "open"))
        assert held == blocks * BLOCK_BYTES
        assert total(samples, "pagemgr_invariant_violations_total") == 0


@pytest.mark.parametrize("seed", range(6))
def test_counters_never_go_down_and_the_run_moves_them(seed: int) -> None:
    manager = make_manager()
    collector = PoolCollector(make_pool(manager))
    before = scrape(collector)
    for _ in random_verbs(manager, 100 + seed, 200):
        after = scrape(collector)
        assert after.keys() == before.keys()  # no series comes or goes
        for key, value in after.items():
            if key[0].endswith("_total"):
                assert value >= before[key], key
        before = after
    for name in ("prefix_hit_tokens", "steps_committed", "steps_aborted", "block_allocations", "allocation_failures"):
        assert total(before, f"pagemgr_{name}_total") > 0, name


def test_values_of_a_run_that_can_be_counted_by_hand() -> None:
    manager = make_manager()
    collector = PoolCollector(make_pool(manager, "main"))
    first = manager.add(range(10))
    manager.commit(manager.reserve([first], [range(10)]))  # 2 full blocks and one with 2 of 4 slots
    second = manager.add(range(10))  # finds the 2 full blocks, 8 of its 10 tokens
    (fork,) = manager.fork(first)  # shares 3 blocks
    samples = scrape(collector)
    have = {name: total(samples, f"pagemgr_{name}", tier="device") for name in ("sharing_saved_bytes", "sequences")}
    assert have == {"sharing_saved_bytes": (2 + 3) * BLOCK_BYTES, "sequences": 3}
    causes = {
        c: total(samples, "pagemgr_pool_bytes", tier="device", cause=c, pool="main")
        for c in ("full", "open_used", "tail_waste")
    }
    assert causes == {"full": 2 * BLOCK_BYTES, "open_used": BLOCK_BYTES / 2, "tail_waste": BLOCK_BYTES / 2}
    assert total(samples, "pagemgr_internal_fragmentation_ratio", tier="device") == pytest.approx(2 / 12)
    assert total(samples, "pagemgr_pool_utilization_ratio", tier="device") == pytest.approx(3 / 39)
    assert total(samples, "pagemgr_prefix_query_tokens_total") == 20
    assert total(samples, "pagemgr_prefix_hit_tokens_total") == 8

    plan = manager.reserve([fork], [[7]])  # writes into the shared tail
    assert total(scrape(collector), "pagemgr_steps_in_flight") == 1
    manager.abort(plan)
    manager.free([fork])
    manager.finish(manager.swap_out([first]))
    with pytest.raises(PagemgrError):
        manager.reserve([second], [1000])
    samples = scrape(collector)
    assert total(samples, "pagemgr_cow_copies_total") == 1
    assert total(samples, "pagemgr_steps_aborted_total") == 1
    assert total(samples, "pagemgr_steps_committed_total") == 1
    assert total(samples, "pagemgr_tokens_committed_total") == 10
    assert total(samples, "pagemgr_swap_sequences_total", direction="out") == 1
    assert total(samples, "pagemgr_swap_blocks_total", direction="out") == 3
    assert total(samples, "pagemgr_swap_bytes_total", direction="out") == 3 * BLOCK_BYTES
    assert total(samples, "pagemgr_swap_bytes_total", direction="in") == 0
    assert total(samples, "pagemgr_sequences", tier="host") == 1
    assert total(samples, "pagemgr_allocation_failures_total", reason="sequence_too_long") == 1
    assert total(samples, "pagemgr_backend_info", backend="torch") == 1
    assert total(samples, "pagemgr_max_sequences") == 10
    assert total(samples, "pagemgr_up") == 1


def test_pins_are_a_cause_of_their_own_while_nobody_else_holds_the_blocks() -> None:
    manager = BlockManager(40, 4, pin_quota=10)
    collector = PoolCollector(make_pool(manager))
    sequence = manager.add(range(10))
    manager.commit(manager.reserve([sequence], [range(10)]))
    pin = manager.pin(sequence, "system prompt")
    held: list[tuple[float, float]] = []
    for verb in (lambda: None, lambda: manager.free([sequence]), lambda: manager.unpin(pin)):
        verb()
        samples = scrape(collector)
        held.append(tuple(total(samples, "pagemgr_pool_bytes", tier="device", cause=c) for c in ("full", "pinned")))
        assert total(samples, "pagemgr_pool_bytes", tier="device") == 40 * BLOCK_BYTES
    assert held == [(2 * BLOCK_BYTES, 0), (0, 2 * BLOCK_BYTES), (0, 0)]


def test_evictions_carry_tier_policy_and_reason() -> None:
    manager = BlockManager(5, 4)
    sequence = manager.add(range(16))
    manager.commit(manager.reserve([sequence], [range(16)]))
    manager.free([sequence])
    manager.reserve([manager.add()], [9])  # 3 blocks, all of them cached
    samples = scrape(PoolCollector(make_pool(manager)))
    assert total(samples, "pagemgr_evictions_total", tier="device", policy="lru", reason="capacity") == 3


def test_an_invariant_violation_is_counted() -> None:
    manager = make_manager()
    manager.tiers[0].pool.refs[3] = 1
    with pytest.raises(PagemgrError):
        manager.check()
    assert total(scrape(PoolCollector(make_pool(manager))), "pagemgr_invariant_violations_total") == 1


def test_bytes_by_cause_names_each_state_once() -> None:
    tier = make_manager().stats().device
    assert bytes_by_cause(tier, 10) == {
        "open_used": 0, "tail_waste": 0, "null": 10, "free": 390, "full": 0, "pinned": 0, "cached": 0, "fenced": 0,
    }  # fmt: skip


# Names --------------------------------------------------------------------------------------------------------------


def test_names_follow_the_rules() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"pagemgr_[a-z_]+", name), name
        assert set(metric.labels) <= ALLOWED_LABELS - {"pool"}, name
        assert metric.meaning.endswith("."), name
        assert not re.search(r"percent|_ms_|_kb_|_count$|_bucket$|_sum$", name), name
        assert (metric.unit == "") == (metric.kind == "info"), name
        if metric.unit in ("bytes", "seconds"):
            assert re.search(rf"_{metric.unit}(_total)?$", name), name


def test_every_name_of_the_table_is_reported_with_its_labels() -> None:
    families = PoolCollector(make_pool(make_manager())).collect()
    reported = {(sample.name, frozenset(sample.labels)) for family in families for sample in family.samples}
    pool = {name: {"pool"} - ({"pool"} if name == "pagemgr_build_info" else set()) for name in METRICS}
    expected = {(name, frozenset({*metric.labels, *pool[name]})) for name, metric in METRICS.items()}
    assert {sample for sample in expected if sample[0] not in TIMED} == reported


# Registering --------------------------------------------------------------------------------------------------------


def test_registering_takes_no_snapshot() -> None:
    def never() -> Stats:
        raise AssertionError("a snapshot was taken")

    registry = CollectorRegistry(auto_describe=True)
    registry.register(PoolCollector(Pool("a", never, 1, "lru", "torch")))
    assert registry.get_sample_value("pagemgr_up", {"pool": "a"}) == 0  # now it was, and failed


def test_a_second_collector_is_refused_and_leaves_the_first() -> None:
    registry = CollectorRegistry()
    first = PoolCollector(make_pool(make_manager(), "a"))
    registry.register(first)
    with pytest.raises(ValueError, match="pagemgr_up"):
        registry.register(PoolCollector(make_pool(make_manager(), "b")))
    assert registry.get_sample_value("pagemgr_up", {"pool": "a"}) == 1
    registry.unregister(first)
    assert list(registry.collect()) == []


def test_pools_need_different_names() -> None:
    with pytest.raises(InvalidInput, match=r"metrics\.pool.*default"):
        PoolCollector(make_pool(make_manager()), make_pool(make_manager()))


def test_two_pools_stand_side_by_side() -> None:
    small, large = BlockManager(4, 4), BlockManager(9, 4)
    collector = PoolCollector(make_pool(small, "small"), make_pool(large, "large"))
    samples = scrape(collector)
    assert total(samples, "pagemgr_pool_bytes", pool="small") == 4 * BLOCK_BYTES
    assert total(samples, "pagemgr_pool_bytes", pool="large") == 9 * BLOCK_BYTES
    assert len({family.name for family in collector.collect()}) == len(METRICS)


# Failing ------------------------------------------------------------------------------------------------------------


class BrokenFence:
    broken = True

    def query(self) -> bool:
        if self.broken:
            raise RuntimeError("the device is gone")
        return True


def test_a_pool_that_cannot_be_read_is_down_and_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    manager, fence = make_manager(), BrokenFence()
    sequence = manager.add(range(5))
    manager.commit(manager.reserve([sequence], [range(5)]))
    manager.free([sequence], after=fence)
    collector = PoolCollector(make_pool(manager, "broken"), make_pool(make_manager(), "sound"))
    with caplog.at_level(logging.ERROR, "pagemgr.metrics"):
        samples = scrape(collector)
    assert [name for name, labels in samples if ("pool", "broken") in labels] == ["pagemgr_up"]
    assert total(samples, "pagemgr_up", pool="broken") == 0
    assert total(samples, "pagemgr_up", pool="sound") == 1
    assert total(samples, "pagemgr_pool_bytes", pool="sound", tier="device") == 40 * BLOCK_BYTES
    assert "broken" in caplog.text
    assert "the device is gone" in caplog.text
    fence.broken = False
    assert total(scrape(collector), "pagemgr_up", pool="broken") == 1


def test_traffic_makes_no_series() -> None:
    """Thousands of tenants, sequences and errors later there is not one more: nobody can fill a Prometheus server."""
    manager = make_manager()
    collector = PoolCollector(make_pool(manager))
    before = set(scrape(collector))
    for n in range(3000):
        sequence = manager.add([n], Namespace(tenant=f"tenant {n}", adapter=f"adapter {n}", media=(b"%d" % n,)))
        manager.commit(manager.reserve([sequence], [[n]]))
        with pytest.raises(InvalidInput):
            manager.fork(sequence, -n)
        manager.free([sequence])
    assert set(scrape(collector)) == before


# Threads and time ---------------------------------------------------------------------------------------------------


def test_scrapes_are_consistent_while_threads_hammer() -> None:
    manager = make_manager()
    collector = PoolCollector(make_pool(manager))
    stop, errors = threading.Event(), []

    def hammer(seed: int) -> None:
        try:
            while not stop.is_set():
                sequence = manager.add(range(seed, seed + 30))
                with suppress(OutOfBlocks):
                    plan = manager.reserve([sequence], [range(seed, seed + 30)])
                    manager.abort(plan)
                manager.free([sequence, *manager.fork(sequence)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            samples = scrape(collector)
            assert total(samples, "pagemgr_up") == 1
            assert total(samples, "pagemgr_pool_bytes", tier="device") == 40 * BLOCK_BYTES
            assert total(samples, "pagemgr_prefix_query_tokens_total") % 30 == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert total(scrape(collector), "pagemgr_prefix_query_tokens_total") > 0


def test_a_scrape_of_a_million_blocks_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    manager = BlockManager(1_000_000, 16, max_seq_len=8192)
    sequences = manager.add_many([()] * 256)
    manager.commit(manager.reserve(sequences, [3000 + i for i in range(256)]))
    manager.reserve(sequences[:128], [2000] * 128)  # and a large prefill in flight
    timed = {what: {kind: Histogram() for kind in kinds} for what, kinds in KINDS.items()}
    pool = Pool("large", lambda: replace(manager.stats(), timings=timed), BLOCK_BYTES, "lru", "torch")
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        generate_latest(registry)
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\n1,000,000 blocks, 256 sequences: a scrape takes {1e3 * min(seconds):.2f} ms")  # noqa: T201
    assert min(seconds) < 0.005


def test_who_does_not_scrape_loads_no_prometheus_and_who_scrapes_no_torch() -> None:
    script = (
        "import sys, pagemgr.manager; assert 'prometheus_client' not in sys.modules;"
        "import pagemgr.metrics; assert 'torch' not in sys.modules; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
