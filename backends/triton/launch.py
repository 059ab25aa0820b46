"""Launching a kernel that was compiled before, without Triton's inspection of every argument at every call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime import driver

from pagemgr.backends.interface import KVLayer

from .device import INTERPRETED

ALIGNMENT = 16
"""Bytes: Triton compiles wider loads for pointers that are multiples of this."""


def scale_strides(kv: KVLayer) -> tuple[int, int]:
    """Of the scales, between blocks and heads; 0 if there are none."""
    return (0, 0) if kv.key_scale is None else (kv.key_scale.stride(0), kv.key_scale.stride(1))


class Launcher:
    """A kernel and its compiled forms, each under a key.

    Triton chooses the form by looking at all arguments, which takes longer than a small kernel runs. Whoever launches
    one of ours knows what the form depends on: the types, the constants, and those integers and pointers that the
    kernel does not list as ``do_not_specialize``.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *args: object, **options: object) -> None:
        """Launch with these arguments of the kernel, all by position.

        ``key``, from ``form``, determines the form; None leaves the choice to Triton. ``options`` are Triton's, and
        the same for the same key.
        """
        compiled = self._compiled.get(key)
        if compiled is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            plain = [arg.data_ptr() if arg.__class__ is torch.Tensor else arg for arg in args]
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *plain)
        elif INTERPRETED or key is None:
            self._kernel[grid](*args, **options)
        else:
            self._compiled[key] = self._kernel[grid](*args, **options)


def form(*tensors: torch.Tensor, depends: tuple[Hashable, ...]) -> Hashable:
    """A key for these tensors, which share device and dtype, and for what else the form depends on.

    None if a tensor is not aligned: rare, and then Triton has to see which one.
    """
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    if address % ALIGNMENT:
        return None
    return (tensors[0].device, tensors[0].dtype, *depends)
