"""Blocks between the device and host memory, by the route that takes least time on this machine.

runs     a copy for each run of neighbouring blocks: what every device can do
batch    the same copies in one call, ``cuMemcpyBatchAsync``, from CUDA 12.8 on
kernel   ``Backend.copy_blocks``, whose threads read and write the host's memory over the bus

Copy engines need a few microseconds for each run, a kernel does not; but engines make better use of the bus within a
long run, and leave the multiprocessors alone. So it depends on the machine, on the size of blocks and on how scattered
they are: what the routes take is measured once, when the tiers are made and nothing is in them.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from .backends.interface import Backend

Pairs = npt.NDArray[np.int32]
"""``[n, 2]``: from, to."""

Route = Callable[[torch.Tensor, torch.Tensor, Pairs], None]
"""Copies blocks of the first tensor to the second, on the current stream of the one that is on a GPU."""

_SAMPLE_BYTES = 16 << 20
_SAMPLE_BLOCKS = 512
_LEAST_BLOCKS = 4
"""Fewer than these say nothing about a route."""

_log = logging.getLogger("pagemgr")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a route takes: for a call, for each run of neighbours, and for each block."""

    call: float
    run: float
    block: float

    @classmethod
    def fit(cls, blocks: int, one: float, scattered: float, neighbours: float) -> Cost:
        """From the seconds for one block, for ``blocks`` of them far from each other, and for as many in one run."""
        block = max(0.0, neighbours - one) / (blocks - 1)
        run = max(0.0, scattered - neighbours) / (blocks - 1)
        return cls(max(0.0, one - run - block), run, block)

    def of(self, runs: int, blocks: int) -> float:
        """Seconds for so many blocks in so many runs."""
        return self.call + self.run * runs + self.block * blocks


class Routes:
    """Moves blocks between the device tier and one in host memory, both contiguous, in either direction.

    Where the device is no GPU, and where tiers are too small to measure anything, there is one route: runs.
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None, backend: Backend) -> None:
        self.routes: dict[str, Route] = {"runs": copy_runs}
        self.costs: dict[str, dict[str, Cost]] = {}
        """By direction and route."""
        if host is None or device.device.type != "cuda":
            return
        if (batch := BatchCopy.find()) is not None:
            self.routes["batch"] = batch
        self.routes["kernel"] = partial(copy_by_kernel, backend)
        for direction, source, target in (("in", host, device), ("out", device, host)):
            self.costs[direction] = _measure(self.routes, source, target)
            _report(direction, device[:1].nbytes, self.costs[direction])

    def move(self, source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
        """Copy these blocks. Raises whatever the route raises; then some blocks of the target were written."""
        costs = self.costs.get("in" if source.device.type == "cpu" else "out", {})
        self.routes[fastest(costs, len(_starts(pairs)), len(pairs))](source, target, pairs)


def fastest(costs: Mapping[str, Cost], runs: int, blocks: int) -> str:
    """The route that takes least time for so many blocks in so many runs."""
    return min(costs, key=lambda route: costs[route].of(runs, blocks), default="runs")


def copy_runs(source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    """One copy for each run of blocks that lie side by side on both sides."""
    for run in np.split(pairs, _starts(pairs)[1:]):
        (start, to), n = run[0].tolist(), len(run)
        target[to : to + n].copy_(source[start : start + n], non_blocking=True)


def copy_by_kernel(backend: Backend, source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    """One launch."""
    device = target.device if source.device.type == "cpu" else source.device
    backend.copy_blocks(source, target, torch.from_numpy(pairs.astype(np.int64)).to(device, non_blocking=True))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: with the order, all 0 but for it, which hold for all copies of a batch."""

    _fields_ = (("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: nothing is read before what the stream was asked for earlier is done."""


class BatchCopy:
    """One call of the driver for all runs:
    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html, cuMemcpyBatchAsync (its first version)."""

    def __init__(self, function: Callable[..., int]) -> None:
        self._function = function
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def find(cls) -> BatchCopy | None:
        """None if the driver is too old, or not NVIDIA's."""
        try:
            function = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync", None)
        except OSError:
            return None
        return None if function is None else cls(function)

    def __call__(self, source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
        """On a stream of its own, since the driver refuses the default one; the current stream waits for it."""
        starts, block_bytes = _starts(pairs), source[:1].nbytes
        sizes = np.diff(starts, append=len(pairs)) * block_bytes
        first = pairs[starts].astype(np.int64) * block_bytes
        froms, to = first[:, 0] + source.data_ptr(), first[:, 1] + target.data_ptr()
        device = target.device if source.device.type == "cpu" else source.device
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        attributes, of_all, failed = _Attributes(_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t()
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (to, froms, sizes)]
        with torch.cuda.device(device):
            status = self._function(
                *arrays, ctypes.c_size_t(len(starts)), ctypes.byref(attributes), ctypes.byref(of_all),
                ctypes.c_size_t(1), ctypes.byref(failed), ctypes.c_void_p(stream.cuda_stream),
            )  # fmt: skip
        current.wait_stream(stream)
        if status:
            raise RuntimeError(
                f"cuMemcpyBatchAsync of {len(starts)} copies failed at {failed.value}: CUresult {status}"
            )

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def _starts(pairs: Pairs) -> npt.NDArray[np.intp]:
    """Where each run of blocks that lie side by side on both sides begins."""
    return np.flatnonzero(np.concatenate(([True], (np.diff(pairs, axis=0) != 1).any(axis=1))))


def _measure(routes: Mapping[str, Route], source: torch.Tensor, target: torch.Tensor) -> dict[str, Cost]:
    """What each route takes; blocks are overwritten, but for the first, the null block. Some ten milliseconds."""
    blocks = min(_SAMPLE_BLOCKS, _SAMPLE_BYTES // source[:1].nbytes, (len(source) - 1) // 2, (len(target) - 1) // 2)
    if blocks < _LEAST_BLOCKS:
        return {}
    draw = np.random.default_rng(0)
    scattered = np.stack([1 + 2 * draw.permutation(blocks) for _ in range(2)], axis=1).astype(np.int32)
    neighbours = np.repeat(np.arange(1, 1 + blocks, dtype=np.int32)[:, None], 2, axis=1)
    costs = {}
    for name, route in routes.items():
        try:
            seconds = [_seconds(route, source, target, pairs) for pairs in (neighbours[:1], scattered, neighbours)]
        except Exception as error:  # a route that does not work here is not taken
            _log.warning("blocks cannot be moved by %s: %s", name, error)
        else:
            costs[name] = Cost.fit(blocks, *seconds)
    return costs


def _seconds(route: Route, source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> float:
    """The least of three, after one that is not counted: whatever disturbs a copy adds to it."""
    device = target.device if source.device.type == "cpu" else source.device
    stream, found = torch.cuda.current_stream(device), list[float]()
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        route(source, target, pairs)
        end.record(stream)
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return min(found[1:])


def _report(direction: str, block_bytes: int, costs: Mapping[str, Cost]) -> None:
    """One line, with the rates for blocks that are far from each other."""
    if not costs:
        return
    n = _SAMPLE_BLOCKS
    rates = {name: n * block_bytes / cost.of(n, n) / 1e9 for name, cost in costs.items()}
    told = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items())
    _log.info("%d scattered blocks of %d KiB move %s: %s", n, block_bytes >> 10, direction, told)
