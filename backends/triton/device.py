"""What launchers ask of the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run on the CPU, by Triton's interpreter: decided when this package is imported, by Triton."""

_INTERPRETED_CTAS = 5
"""Enough to cut small problems into shares."""

_HERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device: Triton launches on torch's current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many CTAs of the largest kind run at once."""
    if device.type != "cuda":
        return _INTERPRETED_CTAS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def chains(device: torch.device) -> bool:
    """Whether a kernel may be scheduled before the one that it waits for has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
