"""What the metrics cost: a decode step with and without timings, and a scrape: ``python -m tests.bench.metrics``.

One cache decodes; of each pair of steps it times one, the first or the second in turn. An engine's times one in
``ONE_IN["step"]``, so that is what the difference is divided by. On a GPU the clock is the wall, and every step is
waited for; on the CPU it is the thread's, as others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

import pagemgr
from pagemgr.metrics import Pool, PoolCollector
from pagemgr.sequences import Batch
from pagemgr.timings import ONE_IN, TIMED, Timings

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64


def make_cache(device: str, num_seqs: int, context: int, steps: int) -> pagemgr.PagedKVCache:
    size = 16
    blocks = num_seqs * (-(-(context + steps) // size) + 1) + 1
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": LAYERS, "num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
            | {"dtype": "bfloat16" if device == "cuda" else "float32"},
            pool={"num_blocks": blocks, "block_size": size, "max_sequences": num_seqs},
            device=device,
        )
    )


class Decoder:
    """Sequences of one cache that grow by a token a step; attention, and nothing else of a model."""

    def __init__(self, cache: pagemgr.PagedKVCache, num_seqs: int, context: int) -> None:
        dtype = getattr(torch, cache.layout.dtype.value)
        self._cache = cache
        self._sequences = cache.add_many([()] * num_seqs)
        with cache.step(self._sequences, [context] * num_seqs) as step:
            step.commit()
        self._batch = Batch(self._sequences)
        self._query = torch.randn(num_seqs, Q_HEADS, HEAD_DIM, dtype=dtype, device=cache.device)
        self._new = torch.randn(num_seqs, KV_HEADS, HEAD_DIM, dtype=dtype, device=cache.device)
        self._out = torch.empty_like(self._query)
        self._counts = [1] * num_seqs

    def step(self) -> None:
        with self._cache.step(self._batch, self._counts) as step:
            for layer in range(LAYERS):
                step.attention(layer, self._query, self._new, self._new, out=self._out)
            step.commit()


def microseconds(call: Callable[[], object], clock: Callable[[], int]) -> float:
    start = clock()
    call()
    return (clock() - start) / 1e3


def steps(device: str, num_seqs: int, context: int, repeats: int) -> dict[str, float]:
    """Medians, in µs, of a step that is timed, of one that is not, and of the difference within a pair of them."""
    cache = make_cache(device, num_seqs, context, 2 * repeats + 40)
    decoder = Decoder(cache, num_seqs, context)
    timings = {"timed": Timings(cache.device), "untimed": Timings(cache.device, enabled=False)}
    clock = time.perf_counter_ns if device == "cuda" else time.thread_time_ns

    def one() -> None:
        decoder.step()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(40):
        one()
    every, ONE_IN["step"] = ONE_IN["step"], 1
    times: dict[str, list[float]] = {name: [] for name in timings}
    for turn in range(repeats):
        for name in list(timings)[:: 1 if turn % 2 else -1]:
            cache.timings = timings[name]
            times[name].append(microseconds(one, clock))
    ONE_IN["step"] = every
    differences = [with_it - without for with_it, without in zip(*times.values(), strict=True)]
    return {**{f"{name}_us": median(found) for name, found in times.items()}, "difference_us": median(differences)}


def marks(device: str, repeats: int = 5000) -> float:
    """µs that the marks of a step take by themselves, on average: of one that is timed, and of those that are not."""
    timings = Timings(torch.device(device))

    def one() -> None:
        start = timings.start("step")
        mark = None if start is None else timings.now()
        mark = timings.lap("kernel", "write_kv", mark, layer=0)
        timings.lap("kernel", "decode", mark, layer=0)
        for _ in range(LAYERS - 1):
            timings.lap("kernel", "decode", timings.lap("kernel", "write_kv", None))
        timings.lap("step", "decode", start, step=1)

    def all_of_them() -> None:
        for _ in range(repeats):
            one()

    return microseconds(all_of_them, time.perf_counter_ns if device == "cuda" else time.thread_time_ns) / repeats


def scrapes(num_blocks: int = 1_000_000, num_seqs: int = 256) -> dict[str, float]:
    """Milliseconds of CPU time: the snapshot, under the manager's lock; the whole collection; both as text."""
    manager, timings = pagemgr.BlockManager(num_blocks, 16, max_seq_len=8192), Timings(torch.device("cpu"))
    sequences = manager.add_many([()] * num_seqs)
    manager.commit(manager.reserve(sequences, [3000 + i for i in range(num_seqs)]))
    for operation, kinds in TIMED.items():
        for kind in kinds:
            timings.lap(operation, kind, timings.now())
    pool = Pool("bench", lambda: replace(manager.stats(), timings=timings.snapshot()), 2**20, "lru", "torch")
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool))
    calls: dict[str, Callable[[], object]] = {
        "snapshot": manager.stats,
        "collection": lambda: list(registry.collect()),
        "text": lambda: generate_latest(registry),
        "OpenMetrics": lambda: generate_openmetrics(registry),
    }
    return {
        name: median(microseconds(call, time.thread_time_ns) for _ in range(40)) / 1e3 for name, call in calls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = ((8, 256), (64, 512))
    result = {
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
        "marks_us": marks(arguments.device),
        "steps": {f"{n} × {context}": steps(arguments.device, n, context, arguments.repeats) for n, context in shapes},
        "scrape_ms": scrapes(),
    }
    if arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"the marks of a step by themselves, on average: {result['marks_us']:.2f} µs")
    for shape, found in result["steps"].items():
        share = found["difference_us"] / ONE_IN["step"] / found["untimed_us"]
        print(
            f"decode {shape}, {LAYERS} layers: {found['untimed_us']:.0f} µs untimed, a timed one takes "
            f"{found['difference_us']:.1f} µs more: {share:.2%} on average; the marks are "
            f"{result['marks_us'] / found['untimed_us']:.2%}"
        )
    for name, milliseconds in result["scrape_ms"].items():
        print(f"scrape of 1,000,000 blocks, {name}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
