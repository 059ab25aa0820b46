"""What the machine can do at best: read memory, copy it, multiply matrices."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch

from .clocks import CpuClock, GpuClock
from .problem import Problem

READ_BYTES = 2 << 30
"""On a GPU: many times its second-level cache."""


def reading(problem: Problem) -> Callable[[], object]:
    """A call that reads K and V once, contiguous, on a CPU: a copy, as what a peer has just read lies in the caches."""
    key, value = (part.flatten().clone().view(torch.float32) for part in (problem.key, problem.value))
    return lambda: key.dot(key) + value.dot(value)


def gpu_bandwidth(clock: GpuClock) -> float:
    """Bytes/s of a kernel that reads and does nothing else."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, sink, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        words = tl.load(source + tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE))
        if tl.xor_sum(words, 0) == 1234567:
            tl.store(sink, 1)

    source = torch.randint(1 << 30, (READ_BYTES // 4,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    calls = {str(size): lambda size=size: read[(len(source) // size,)](source, sink, size) for size in (8192, 16384)}
    return READ_BYTES / min(clock.medians(calls).values())


def flops(clock: CpuClock | GpuClock, device: torch.device, dtype: str) -> float:
    """What torch's own matrix product reaches, in flop/s."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * size**3 / clock.medians({"product": lambda: torch.mm(a, b, out=out)})["product"]


def hardware(device: torch.device, threads: int) -> str:
    """What the numbers are taken on, in a few words."""
    if device.type == "cuda":
        import triton

        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {threads} thread(s), torch {torch.__version__}"
