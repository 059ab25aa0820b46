"""What is timed and when, that nothing is timed if not wanted, and that timing cannot stop an engine."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pagemgr
from pagemgr.capture import beside_captures
from pagemgr.stats import BUCKETS, Histogram
from pagemgr.timings import ONE_IN, TIMED, Timings

CPU = torch.device("cpu")


def make_cache(**metrics: object) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 3, "num_kv_heads": 1, "head_dim": 64, "dtype": "float16"},
            pool={"num_blocks": 40, "block_size": 16, "host_blocks": 20},
            device="cpu",
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
    """As many rounds as steps are passed over: in each a prefill, another that copies a tail, and two decodes."""
    for turn in range(ONE_IN["step"]):
        first = 100 * turn
        sequence = cache.add(range(first, first + 20))
        run(cache, [sequence], [[*range(first, first + 20)]])
        (fork,) = cache.fork(sequence)
        run(cache, [sequence, fork], [[1, 2], [3]])
        run(cache, [sequence], [[4]])
        run(cache, [sequence], [[5]])
        cache.free([fork])
        if turn < 2:
            cache.swap_out([sequence])
            cache.swap_in([sequence])
        cache.free([sequence])


def counted(cache: pagemgr.PagedKVCache) -> dict[str, dict[str, int]]:
    timings = cache.stats().timings
    return {operation: {kind: sum(h.counts) for kind, h in kinds.items()} for operation, kinds in timings.items()}


def test_some_steps_are_timed_and_one_layer_of_each_and_every_swap() -> None:
    cache = make_cache()
    use(cache)
    assert counted(cache) == {
        "step": {"decode": 2, "prefill": 2},  # of two kinds of each
        "kernel": {"write_kv": 4, "decode": 2, "prefill": 2, "copy_blocks": 1},
        "swap": {"out": 2, "in": 2},
        "host_cache": {"out": 0, "in": 0},
    }
    layers = [e[0]["layer"] for e in cache.stats().timings["kernel"]["write_kv"].exemplars if e is not None]
    assert set(layers) <= {0, 1, 2}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    timings = Timings(torch.device("cuda"))
    cycles = 20_000_000
    for _ in range(3):
        mark = timings.start("swap")
        torch.cuda._sleep(cycles)
        mark = timings.lap("swap", "out", mark)
        torch.cuda._sleep(cycles // 2)
        timings.lap("swap", "in", mark)
        torch.cuda.synchronize()
    timings.lap("step", "decode", timings.now())  # what has passed is counted by the laps that follow
    out, back = (timings.snapshot()["swap"][direction] for direction in ("out", "in"))
    assert (sum(out.counts), sum(back.counts)) == (3, 3)
    assert out.sum > 3 * cycles / 3e9  # no clock is faster than 3 GHz
    assert back.sum == pytest.approx(out.sum / 2, rel=0.3)


@pytest.mark.gpu
def test_capture_into_a_graph_is_not_disturbed() -> None:
    timings, graph = Timings(torch.device("cuda")), torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    mark = timings.now()
    with torch.cuda.graph(graph):
        assert timings.now() is None
        number += 1
        assert timings.lap("swap", "out", mark) is None
        timings.snapshot()
    graph.replay()
    assert number.item() == 1


@pytest.mark.gpu
def test_fences_are_asked_in_one_thread_while_another_captures() -> None:
    event, answers = torch.cuda.Event(), []
    event.record()

    def scrape() -> None:
        with beside_captures(torch.device("cuda")):
            answers.append(event.query())

    number = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        number += 1
        thread = threading.Thread(target=scrape)
        thread.start()
        thread.join()
        number += 1
    assert answers == [True]


def test_beside_captures_needs_no_driver_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)
    with beside_captures(CPU):
        pass


@pytest.mark.parametrize(("status", "calls"), [(0, [2, 0]), (3, [2])])
def test_a_thread_is_as_strict_afterwards_as_before(
    monkeypatch: pytest.MonkeyPatch, status: int, calls: list[int]
) -> None:
    seen: list[int] = []

    def exchange(mode: Any) -> int:
        seen.append(mode._obj.value)
        mode._obj.value = 0 if status == 0 else mode._obj.value
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    with suppress(ZeroDivisionError), beside_captures(torch.device("cuda")):
        raise ZeroDivisionError
    assert seen == calls


def test_off_means_that_nothing_is_timed_or_reported() -> None:
    cache = make_cache(timings=False)
    use(cache)
    assert cache.timings.now() is None
    assert cache.stats().timings == {}


def test_a_step_that_is_taken_back_is_not_counted() -> None:
    cache = make_cache()
    for _ in range(ONE_IN["step"]):
        with cache.step([cache.add()], [[1, 2]]):
            pass
    assert counted(cache)["step"] == {"decode": 0, "prefill": 0}


def test_the_time_is_that_on_the_clock() -> None:
    timings = Timings(CPU)
    start = time.perf_counter()
    mark = timings.now()
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
        histogram.add(seconds, {"step": seconds}, 1.5e9)
    assert histogram.counts == [2, 1, *[0] * (len(BUCKETS) - 3), 1, 1]
    assert histogram.sum == pytest.approx(21.0000021)
    assert [e[1] for e in histogram.exemplars if e is not None] == [1e-6, 1.1e-6, 10.0, 11.0]
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_a_snapshot_does_not_change() -> None:
    timings = Timings(CPU)
    before = timings.snapshot()
    timings.lap("swap", "in", timings.start("swap"))
    assert sum(before["swap"]["in"].counts) == 0
    assert {operation: tuple(kinds) for operation, kinds in before.items()} == TIMED


def test_a_device_that_cannot_be_timed_ends_the_timing_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", broken)
    timings = Timings(torch.device("cuda"))
    assert timings.now() is None
    assert "cannot be timed" in caplog.text
    assert timings.snapshot() == {}


def test_a_swap_leads_to_the_trace_that_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    span = SimpleNamespace(get_span_context=lambda: SimpleNamespace(is_valid=True, trace_id=0xABC))
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=lambda: span))
    cache = make_cache()
    use(cache)
    exemplars = [e for e in cache.stats().timings["swap"]["out"].exemplars if e is not None]
    assert exemplars[0][0] == {"blocks": 2, "trace_id": f"{0xABC:032x}"}
