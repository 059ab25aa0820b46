"""How long calls take: several of them in turns, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Calls = Mapping[str, Callable[[], object]]

PATIENCE = 2.0
"""Seconds that the calls of one shape may take on a CPU."""
FLUSHED_BYTES = 256 << 20
"""Read before each timed run on a GPU: several times its second-level cache."""


class CpuClock:
    """The thread's CPU time with one thread, which other work disturbs least; the wall's with more."""

    def __init__(self, threads: int) -> None:
        self._now = time.thread_time if threads == 1 else time.perf_counter

    def medians(self, calls: Calls) -> dict[str, float]:
        """Seconds of each call; the slowest ones are repeated less often."""
        once = {name: self._seconds(call) for name, call in calls.items()}
        share = PATIENCE / len(calls)
        rounds = {name: max(3, min(200, int(share / seconds))) for name, seconds in once.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(max(rounds.values())):
            for name, call in calls.items():
                if turn < rounds[name]:
                    samples[name].append(self._seconds(call))
        return {name: statistics.median(taken) for name, taken in samples.items()}

    def _seconds(self, call: Callable[[], object]) -> float:
        start = self._now()
        call()
        return self._now() - start


class GpuClock:
    """Events around the replay of a graph that holds the call, the second-level cache cold."""

    def __init__(self, repeats: int = 15) -> None:
        self._repeats = repeats
        self._flushed = torch.zeros(FLUSHED_BYTES // 4, device="cuda")

    def medians(self, calls: Calls) -> dict[str, float]:
        """Seconds of each call on the device."""
        graphs = {name: captured(call) for name, call in calls.items()}
        events = {
            name: [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(self._repeats)] for name in calls
        }
        for turn in range(self._repeats):
            for name, graph in graphs.items():
                self._flushed.sum()
                start, end = events[name][turn]
                start.record()
                graph.replay()
                end.record()
        torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
            for name, pairs in events.items()
        }


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The call as a graph, after one run that compiles what is to be compiled."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def host_seconds(call: Callable[[], object], repeats: int = 300) -> float:
    """CPU time that the calling thread spends on one call, nothing awaited; the median."""
    call()
    samples = []
    for turn in range(repeats):
        start = time.thread_time()
        call()
        samples.append(time.thread_time() - start)
        if turn % 50 == 49 and torch.cuda.is_available():  # a full queue would be waited for
            torch.cuda.synchronize()
    return statistics.median(samples)
