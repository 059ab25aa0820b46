"""Asking events of a GPU in one thread while another one captures a CUDA graph.

CUDA ends a capture when any thread makes a call that might have to do with it, and asking an event is such a call, as a
scrape does of the fences of released blocks. A thread that says that it knows better is left alone, and so is the
capture: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__STREAM.html, cuThreadExchangeStreamCaptureMode.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


@contextmanager
def beside_captures(device: torch.device) -> Iterator[None]:
    """What this thread asks inside ends no capture of another one."""
    if device.type != "cuda":
        yield
        return
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)  # becomes what it was before
    relaxed = exchange(ctypes.byref(mode)) == 0
    try:
        yield
    finally:
        if relaxed:
            exchange(ctypes.byref(mode))
