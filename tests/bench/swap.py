"""Blocks between the device and pinned host memory, by every route: ``python -m tests.bench.swap`` on a GPU.

256 MiB of scattered blocks, beside one contiguous copy of as much in the same turns; bytes are compared first. The
device is kept busy for a while before each, as by a step, so that what the host needs to begin is not counted; all that
it needs is given as thread CPU time. Both ways at once is one route out and one in, on two streams.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pagemgr.backends import Backend, create
from pagemgr.cli.output import print_table
from pagemgr.layout import BlockLayout, DType
from pagemgr.routes import Pairs, Routes, copy_by_kernel, fastest

MOVED = 256 << 20
SIZES = tuple(8192 << power for power in range(0, 9, 2))
ROUNDS = 5
SLOW = 0.1
BUSY_CYCLES = 2_000_000
"""A millisecond."""
CONTIGUOUS = "contiguous"
WAYS = ("in", "out", "both")

Moves = dict[str, Callable[[], None]]


class Tiers:
    """Memory for twice what is moved on either side, cut into blocks of any size."""

    def __init__(self) -> None:
        self._device = torch.empty(2 * MOVED, dtype=torch.uint8, device="cuda")
        self._host = torch.empty(2 * MOVED, dtype=torch.uint8, pin_memory=True)
        self._aside = torch.cuda.Stream()
        self.fill()

    def fill(self) -> None:
        """Other bytes everywhere."""
        self._device.random_(256)
        self._host.copy_(self._device.flip(0))

    def cut(self, block_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The device's and the host's blocks."""
        return self._device.view(-1, block_bytes), self._host.view(-1, block_bytes)

    def moves(self, routes: Routes, block_bytes: int) -> Iterator[tuple[str, str, Callable[[], None]]]:
        """(way, route, call) for all of them, each checked; for the contiguous copy as well."""
        device, host = self.cut(block_bytes)
        count, draw = MOVED // block_bytes, np.random.default_rng(block_bytes)
        ids = np.stack([draw.permutation(2 * count) for _ in range(2)], axis=1).astype(np.int32)
        into, out = ids[:count], ids[count:, ::-1].copy()
        yield from self._ways(CONTIGUOUS, lambda: device[:count].copy_(host[:count], non_blocking=True),
                              lambda: host[count:].copy_(device[count:], non_blocking=True))  # fmt: skip
        for name, route in routes.routes.items():
            ways = partial(route, host, device, into), partial(route, device, host, out)
            self._check(ways, device, host, into, out)
            yield from self._ways(name, *ways)

    def _ways(
        self, name: str, into: Callable[[], object], out: Callable[[], object]
    ) -> Iterator[tuple[str, str, Callable[[], None]]]:
        def both() -> None:
            current = torch.cuda.current_stream()
            self._aside.wait_stream(current)
            with torch.cuda.stream(self._aside):
                out()
            into()
            current.wait_stream(self._aside)

        yield from ((way, name, call) for way, call in zip(WAYS, (into, out, both), strict=True))

    def _check(
        self, ways: tuple[Callable[[], None], ...], device: torch.Tensor, host: torch.Tensor, into: Pairs, out: Pairs
    ) -> None:
        self.fill()
        tiers = (device, host)
        for call, pairs, (target, source) in zip(ways, (into, out), (tiers, tiers[::-1]), strict=True):
            start, to = torch.from_numpy(pairs).cuda().long().T
            expected = target.to("cuda", copy=True)
            expected[to] = source.cuda()[start]
            call()
            if not torch.equal(target.cuda(), expected):
                raise AssertionError(f"other bytes than expected after {call}")


def timed(calls: dict[Any, Callable[[], None]], rounds: int = ROUNDS) -> dict[Any, tuple[float, float]]:
    """Seconds of the device and of the host's thread, medians over turns, of which the first is not counted.

    What takes more than ``SLOW`` seconds has one turn, which is.
    """
    found: dict[Any, list[tuple[float, float]]] = {key: [] for key in calls}
    slow = set[Any]()
    for turn in range(rounds + 1):
        for key, call in calls.items():
            if key in slow:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            before = time.thread_time()
            call()
            host = time.thread_time() - before
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
            if seconds > SLOW:
                slow.add(key)
            if turn or seconds > SLOW:
                found[key].append((seconds, host))
    return {key: tuple(map(statistics.median, zip(*times, strict=True))) for key, times in found.items()}


def within(tiers: Tiers, backend: Backend, block_bytes: int) -> float:
    """GB/s, read and written, of copies of scattered blocks within the device."""
    device, _ = tiers.cut(block_bytes)
    pairs = np.random.default_rng(1).permutation(len(device)).reshape(-1, 2).astype(np.int32)
    seconds, _ = timed({"copy": partial(copy_by_kernel, backend, device, device, pairs)})["copy"]
    return 2 * len(pairs) * block_bytes / seconds / 1e9


@click.command(help=__doc__)
@click.option("--backend", "backends", multiple=True, default=("cuda", "triton"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(backends: tuple[str, ...], json_path: Path | None) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {MOVED >> 20} MiB in scattered blocks")
    tiers, records = Tiers(), []
    for name in backends:
        backend = create(name, BlockLayout(1, 8, 128, 16, DType.bfloat16), 4, "cuda")
        for block_bytes in SIZES:
            made = time.perf_counter()
            routes = Routes(*tiers.cut(block_bytes), backend)
            made = time.perf_counter() - made
            calls = {(way, route): call for way, route, call in tiers.moves(routes, block_bytes)}
            times, count = timed(calls), MOVED // block_bytes
            chosen = {way: fastest(costs, count, count) for way, costs in routes.costs.items()}
            for (way, route), (seconds, host) in times.items():
                ceiling = times[way, CONTIGUOUS][0]
                rate = (2 if way == "both" else 1) * MOVED / seconds / 1e9
                records.append({
                    "backend": name, "block_bytes": block_bytes, "way": way, "route": route, "GB/s": rate,
                    "share": ceiling / seconds, "host_us_per_block": host / count * 1e6,
                    "chosen": chosen.get(way) == route, "measuring_ms": made * 1e3,
                })  # fmt: skip
            records.append({"backend": name, "block_bytes": block_bytes, "way": "within", "route": "kernel",
                            "GB/s": within(tiers, backend, block_bytes)})  # fmt: skip
    _show(records)
    if json_path:
        json_path.write_text(json.dumps(records, indent=1) + "\n")


def _show(records: list[dict[str, Any]]) -> None:
    print_table(
        "moved",
        ("backend", "KiB", "way", "route", "GB/s", "of contiguous", "host us/block", "chosen"),
        [
            (
                one["backend"], f"{one['block_bytes'] >> 10}", one["way"], one["route"], f"{one['GB/s']:.1f}",
                f"{one['share']:.3f}" if "share" in one else "",
                f"{one['host_us_per_block']:.2f}" if "share" in one else "", "yes" if one.get("chosen") else "",
            )
            for one in records
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
