"""``pagemgr bench``: how fast the manager and the backends are here, each beside a ceiling measured in the same run.

A glance at a machine, in half a minute. The benchmarks by shape and against peers are those of ``tests/bench``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

from pagemgr.backends import AttentionParams
from pagemgr.backends.registry import availability
from pagemgr.cache import PagedKVCache
from pagemgr.config import Config, ModelConfig, PoolConfig
from pagemgr.errors import PagemgrError
from pagemgr.ids import TokenArray
from pagemgr.layout import DType
from pagemgr.manager import BlockManager
from pagemgr.sequences import Batch

from .output import amount, print_json, print_table

SECONDS = 0.6
"""That one figure may take."""
MOST = 200
SEQUENCES, PROMPT, SIZE = 256, 4096, 16
HEADS, GROUP, DIM = 8, 4, 128
CONTEXT, BATCH = 1024, 16
SWAPPED = 64
"""Blocks of one sequence that moves."""

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: seconds are medians."""

    what: str
    seconds: float
    bytes: int = 0
    """That had to be moved; 0 where that is not the point."""
    ceiling: str = ""
    """What the time is held against."""
    ceiling_seconds: float = 0.0

    @property
    def share(self) -> float | None:
        """Of the ceiling: 1 is as fast."""
        return self.ceiling_seconds / self.seconds if self.ceiling_seconds else None


@click.command("bench")
@click.option("--device", default="auto", show_default=True, help='Of the backends: "cpu", "cuda", or "auto".')
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(device: str, as_json: bool) -> None:
    """How fast the manager and the backends are on this machine, in half a minute.

    \b
    pagemgr bench
    pagemgr bench --device cuda --json > bench.json

    Medians of calls with the Python around them. A share is that of a ceiling, measured in turns with it: the same
    bytes read or copied once, contiguous. Run it on an idle machine.
    """
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    figures = [*_manager(), *_backends(where), *_swaps(where)]
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if as_json:
        shares = [{**asdict(figure), "share": figure.share} for figure in figures]
        print_json({"device": str(where), "hardware": hardware, "figures": shares})
        return
    print_table(f"on {hardware}", ("what", "time", "rate", "of the ceiling", "which is"), map(_row, figures))
    click.echo("\nnext: pagemgr plan --link takes the rate of a swap; tests/bench measures by shape, against peers")


def _row(figure: Figure) -> tuple[object, ...]:
    rate = f"{amount(figure.bytes / figure.seconds)}/s" if figure.bytes else None
    share = None if figure.share is None else f"{figure.share:.0%}"
    return figure.what, f"{figure.seconds * 1e6:,.0f} µs", rate, share, figure.ceiling or None


def _medians(calls: dict[str, Call], device: torch.device | None = None) -> dict[str, float]:
    """Seconds of each, taking turns, after one call to warm up."""

    def clock(call: Call) -> float:
        started = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock(call)
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS * len(calls) and len(times[next(iter(times))]) < MOST:
        for name, call in calls.items():
            times[name].append(clock(call))
    return {name: statistics.median(values) for name, values in times.items()}


# The manager --------------------------------------------------------------------------------------------------------


def _manager() -> Iterator[Figure]:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> TokenArray:
        return rng.integers(0, 32_000, count).astype(np.int32)

    yield Figure(f"step of {SEQUENCES} sequences", _step(tokens))
    manager = BlockManager(40 * PROMPT // SIZE, SIZE, max_seq_len=2 * PROMPT)
    prompt = tokens(PROMPT)

    def admit(ids: TokenArray) -> None:
        sequence = manager.add(ids)
        manager.commit(manager.reserve([sequence], [ids[sequence.num_cached_tokens :]]))
        manager.free([sequence])

    times = _medians({"cold": lambda: admit(tokens(PROMPT)), "cached": lambda: admit(prompt)})
    yield Figure(f"admit and free {PROMPT:,} tokens, cold", times["cold"])
    yield Figure(f"admit and free {PROMPT:,} tokens, cached", times["cached"])
    sequence = manager.add(prompt)
    times = _medians({"fork": lambda: manager.free(manager.fork(sequence, 4))})
    yield Figure("fork to 4 and free them", times["fork"])


def _step(tokens: Callable[[int], TokenArray]) -> float:
    """Reserve and commit one token for each of many sequences; block boundaries are staggered."""
    steps = MOST + 2
    manager = BlockManager(SEQUENCES * ((CONTEXT + steps) // SIZE + 3), SIZE, max_seq_len=CONTEXT + 2 * steps)
    sequences = manager.add_many([()] * SEQUENCES)
    manager.commit(manager.reserve(sequences, [tokens(CONTEXT + i % SIZE) for i in range(SEQUENCES)]))
    batch, ids = Batch(sequences), tokens(SEQUENCES).reshape(-1, 1)
    return _medians({"step": lambda: manager.commit(manager.reserve(batch, ids))})["step"]


# The backends -------------------------------------------------------------------------------------------------------


def _backends(device: torch.device) -> Iterator[Figure]:
    """Decode attention of each backend that runs on the device."""
    dtype = DType.bfloat16 if device.type == "cuda" else DType.float32
    model = ModelConfig(num_layers=1, num_kv_heads=HEADS, num_q_heads=HEADS * GROUP, head_dim=DIM, dtype=dtype)
    pool = PoolConfig(num_blocks=BATCH * (CONTEXT // SIZE + 1) + 1, max_seq_len=CONTEXT + 1, max_sequences=BATCH)
    for name in (one.name for one in availability() if one.available):
        try:
            cache = PagedKVCache(Config(model=model, pool=pool, device=str(device), backend=name))
        except PagemgrError:
            continue  # it runs, but not on this device or with this element type
        yield from _decode(cache)


def _decode(cache: PagedKVCache) -> Iterator[Figure]:
    sequences = cache.add_many([()] * BATCH)
    manager, layer = cache.manager, cache.storage.layers[0]
    layer.key.normal_()
    layer.value.normal_()
    manager.commit(manager.reserve(sequences, [CONTEXT] * BATCH))
    query = torch.randn(BATCH, HEADS * GROUP, DIM, device=cache.device).to(layer.key.dtype)
    key = torch.randn(BATCH, HEADS, CONTEXT + 1, DIM, device=cache.device).to(layer.key.dtype)
    value = torch.randn_like(key)
    flat_key, flat_value, one = key.flatten(), value.flatten(), query.unsqueeze(2)
    with cache.step(sequences, [1] * BATCH) as step:
        (batch,), params = step.batches, AttentionParams()
        times = _medians(
            {
                "paged": lambda: cache.backend.attention(query, layer, batch, params),
                "read": lambda: (flat_key.dot(flat_key), flat_value.dot(flat_value)),
                "sdpa": lambda: F.scaled_dot_product_attention(one, key, value, enable_gqa=True),
            },
            cache.device,
        )
    moved, what = 2 * key.nbytes, f"decode, {BATCH} × {CONTEXT:,} tokens"
    yield Figure(f"{cache.backend.name}: {what}", times["paged"], moved, "reading K and V once", times["read"])
    yield Figure("  torch SDPA, K/V gathered", times["sdpa"], moved, "reading K and V once", times["read"])


# Moving -------------------------------------------------------------------------------------------------------------


def _swaps(device: torch.device) -> Iterator[Figure]:
    """A sequence of large blocks, as an 8B model's, to the host and back."""
    model = ModelConfig(num_layers=32, num_kv_heads=HEADS, head_dim=DIM, dtype=DType.bfloat16)
    blocks = SWAPPED + 2
    pool = PoolConfig(num_blocks=blocks, host_blocks=blocks, max_sequences=1)
    backend = "auto" if device.type == "cuda" else "torch"  # of which nothing is asked but to be there
    cache = PagedKVCache(Config(model=model, pool=pool, device=str(device), backend=backend))
    for tier in cache.storage.tiers.values():
        tier.zero_()  # untouched memory is not there yet
    sequence = cache.add()
    cache.manager.commit(cache.manager.reserve([sequence], [SWAPPED * SIZE]))
    device_blocks, host_blocks = (cache.storage.tiers[name][1 : 1 + SWAPPED] for name in ("device", "host"))
    moved = [sequence]
    swaps: Iterator[Call] = itertools.cycle((lambda: cache.swap_out(moved), lambda: cache.swap_in(moved)))
    copies: Iterator[Call] = itertools.cycle(
        (lambda: host_blocks.copy_(device_blocks), lambda: device_blocks.copy_(host_blocks))
    )
    times = _medians({"swap": lambda: next(swaps)(), "copy": lambda: next(copies)()}, device)
    size = SWAPPED * cache.layout.block_bytes
    yield Figure(f"swap {amount(size)} out or in", times["swap"], size, "one contiguous copy", times["copy"])
