"""The operations that move K and V, and what a call costs the host."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import torch

from pagemgr.backends import Backend

from .clocks import Calls, CpuClock, GpuClock, host_seconds
from .problem import attend, build, slots_of
from .shapes import decode, prefill

TOKENS = (1, 256, 2048, 16384, 65536)
"""Of ``write_kv``, 8 heads of 128 elements each."""
BLOCKS = ((64 << 10, 16), (64 << 10, 512), (64 << 10, 8192), (2 << 20, 64), (2 << 20, 512))
"""Of ``copy_blocks``: bytes of a block, blocks."""
MOVED = ("operation", "backend", "µs", "GB/s", "of copy")
HOST = ("operation", "backend", "µs of the host", "s of the first call")

Backends = Mapping[str, Backend]


def moved(backends: Backends, clock: CpuClock | GpuClock, device: torch.device, dtype: str) -> list[tuple[str, ...]]:
    """Rows of the table ``MOVED``: bytes read and written, beside one contiguous copy of as many in the same turns."""
    large = device.type == "cuda"
    rows = []
    for tokens in TOKENS if large else TOKENS[:3]:
        problem = build(prefill(1, tokens, 8, 1, 128), device, dtype)
        slots = slots_of(problem.batch.block_table[0], tokens, problem.shape.block_size)
        stored = (problem.key, problem.value, problem.kv, slots)
        calls = {name: partial(backend.write_kv, *stored) for name, backend in backends.items()}
        rows += _beside_copy(f"write_kv, {tokens} tokens", 2 * problem.key.nbytes, calls, clock, device)
    for block_bytes, count in BLOCKS if large else BLOCKS[:2]:
        pool = torch.randint(256, (4 * count, block_bytes), dtype=torch.uint8, device=device)
        pairs = torch.randperm(4 * count, device=device)[: 2 * count].view(-1, 2)
        calls = {name: partial(backend.copy_blocks, pool, pool, pairs) for name, backend in backends.items()}
        what = f"copy_blocks, {count} of {block_bytes >> 10} KiB"
        rows += _beside_copy(what, count * block_bytes, calls, clock, device)
    return rows


def _beside_copy(
    what: str, size: int, calls: Calls, clock: CpuClock | GpuClock, device: torch.device
) -> list[tuple[str, ...]]:
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    times = clock.medians({**calls, "copy": lambda: target.copy_(source)})
    copied = times.pop("copy")
    return [
        (what, name, f"{took * 1e6:.1f}", f"{2 * size / took / 1e9:.0f}", f"{copied / took:.2f}")
        for name, took in times.items()
    ]


def host(backends: Backends, device: torch.device, dtype: str) -> list[tuple[str, ...]]:
    """Rows of the table ``HOST``: the same call again and again, as the layers of a step make it.

    The first one may have to compile, unless the process or a cache on disk has done so before.
    """
    few, prompts = (build(shape, device, dtype) for shape in (decode(2, 100, 8, 4, 128), prefill(2, 100, 8, 4, 128)))
    new = few.key[:2].contiguous()
    rows = []
    for name, backend in backends.items():
        calls = {
            "attention, decode": attend(backend, few, torch.empty_like(few.query)),
            "attention, prefill": attend(backend, prompts, torch.empty_like(prompts.query)),
            "write_kv": partial(backend.write_kv, new, new, few.kv, few.batch.slot_mapping),
        }
        for what, call in calls.items():
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            rows.append((what, name, f"{host_seconds(call) * 1e6:.1f}", f"{first:.3f}"))
    return rows
