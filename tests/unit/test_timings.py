"""What is timed and when, that nothing is timed if not wanted, and that timing cannot stop an engine."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

import pagemgr
from pagemgr.stats import BUCKETS, Histogram
from pagemgr.timings import TIMED, Timings

CPU = torch.device("cpu")


def make_cache(device: str = "cpu", **metrics: object) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 3, "num_kv_heads": 1, "head_dim": 64, "dtype": "float16"},
            pool={"num_blocks": 40, "block_size": 16, "host_blocks": 20},
            device=device,
            backend="torch",
            metrics=metrics,
        )
    )


def run(cache: pagemgr.PagedKVCache, sequences: list[pagemgr.Sequence], tokens: list[list[int]]) -> None:
    with cache.step(sequences, tokens) as step:
        for layer in range(3):
            new = torch.randn(step.plan.num_tokens, 1, 64, dtype=torch.float16, device=cache.device)
            step.attention(layer, new, new, new)
        step.commit()


def use(cache: pagemgr.PagedKVCache) -> None:
    """Two prefills, the second of which copies a shared tail; two decodes; out and in."""
    sequence = cache.add(range(20))
    run(cache, [sequence], [[*range(20)]])
    (fork,) = cache.fork(sequence)
    run(cache, [sequence, fork], [[1, 2], [3]])
    run(cache, [sequence], [[4]])
    run(cache, [sequence], [[5]])
    cache.swap_out([sequence])
    cache.swap_in([sequence])


def counted(cache: pagemgr.PagedKVCache) -> dict[str, dict[str, int]]:
    timings = cache.stats().timings
    return {operation: {kind: sum(h.counts) for kind, h in kinds.items()} for operation, kinds in timings.items()}


EXPECTED = {
    "step": {"decode": 2, "prefill": 2},
    "kernel": {"write_kv": 4, "decode": 2, "prefill": 2, "copy_blocks": 1},  # one layer of each step
    "swap": {"out": 1, "in": 1},
}


def test_one_layer_of_each_step_is_timed_and_every_step_and_swap() -> None:
    cache = make_cache()
    use(cache)
    assert counted(cache) == EXPECTED
    layers = {e[0]["layer"] for e in cache.stats().timings["kernel"]["write_kv"].exemplars if e is not None}
    assert layers <= {0, 1, 2}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    cache = make_cache("cuda", timings=True)
    for _ in range(3):
        use(cache)
        torch.cuda.synchronize()
    cache.add()
    use(cache)  # what has passed is counted by the laps that follow
    for operation, kinds in counted(cache).items():
        for kind, count in kinds.items():
            assert 3 * EXPECTED[operation][kind] <= count <= 4 * EXPECTED[operation][kind], (operation, kind)
    timings = Timings(torch.device("cuda"))
    cycles = 20_000_000
    for _ in range(3):
        mark = timings.start()
        torch.cuda._sleep(cycles)
        timings.lap("swap", "out", mark)
        torch.cuda.synchronize()
    timings.lap("swap", "out", timings.start())
    assert timings.snapshot()["swap"]["out"].sum > 3 * cycles / 3e9  # no clock is faster than 3 GHz


@pytest.mark.gpu
def test_capture_into_a_graph_is_not_disturbed() -> None:
    timings, graph = Timings(torch.device("cuda")), torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    mark = timings.start()
    with torch.cuda.graph(graph):
        assert timings.start() is None
        number += 1
        assert timings.lap("swap", "out", mark) is None
        timings.snapshot()
    graph.replay()
    assert number.item() == 1


def test_off_means_that_nothing_is_timed_or_reported() -> None:
    cache = make_cache(timings=False)
    use(cache)
    assert cache.timings.start() is None
    assert cache.stats().timings == {}


def test_a_step_that_is_taken_back_is_not_counted() -> None:
    cache = make_cache()
    with cache.step([cache.add()], [[1, 2]]):
        pass
    assert counted(cache)["step"] == {"decode": 0, "prefill": 0}


def test_the_time_is_that_on_the_clock() -> None:
    timings = Timings(CPU)
    start = time.perf_counter()
    mark = timings.start()
    time.sleep(0.02)
    between = timings.lap("kernel", "write_kv", mark, layer=1)
    timings.lap("kernel", "decode", between, layer=1)
    most = time.perf_counter() - start
    first, second = (timings.snapshot()["kernel"][kind].sum for kind in ("write_kv", "decode"))
    assert 0.02 <= first < most
    assert 0 <= second < most - 0.02


def test_a_duration_is_counted_in_the_bucket_that_it_does_not_exceed() -> None:
    histogram = Histogram()
    for seconds in (0.0, 1e-6, 1.1e-6, 10.0, 11.0):
        histogram.add(seconds, {"step": seconds})
    assert histogram.counts == [2, 1, *[0] * (len(BUCKETS) - 3), 1, 1]
    assert histogram.sum == pytest.approx(21.0000021)
    assert [e[1] for e in histogram.exemplars if e is not None] == [1e-6, 1.1e-6, 10.0, 11.0]
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_a_snapshot_does_not_change() -> None:
    timings = Timings(CPU)
    before = timings.snapshot()
    timings.lap("swap", "in", timings.start())
    assert sum(before["swap"]["in"].counts) == 0
    assert {operation: tuple(kinds) for operation, kinds in before.items()} == TIMED


def test_a_device_that_cannot_be_timed_ends_the_timing_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", broken)
    timings = Timings(torch.device("cuda"))
    assert timings.start() is None
    assert "cannot be timed" in caplog.text
    assert timings.snapshot() == {}


def test_a_swap_leads_to_the_trace_that_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    span = SimpleNamespace(get_span_context=lambda: SimpleNamespace(is_valid=True, trace_id=0xABC))
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=lambda: span))
    cache = make_cache()
    use(cache)
    (exemplar,) = [e for e in cache.stats().timings["swap"]["out"].exemplars if e is not None]
    assert exemplar[0] == {"blocks": 2, "trace_id": f"{0xABC:032x}"}
