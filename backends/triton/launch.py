"""Launching a kernel that was compiled before, without Triton's inspection of every argument at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime import driver

from pagemgr.backends.interface import KVLayer

from .device import INTERPRETED, on

ALIGNMENT = 16
"""Bytes: Triton compiles wider loads for pointers that are multiples of this."""
ALIGNED = 4
"""How many of a prepared call's tensors, the first ones, a form expects to be aligned."""


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
        compiled = self.compiled(key)
        if compiled is not None:
            stream = _stream(driver.active.get_current_device())
            compiled.run(*grid, stream, *_handles(compiled), *map(_plain, args))
        else:
            self.compile(grid, key, *args, **options)

    def compiled(self, key: Hashable) -> Any:
        """The form under this key, None if it has not been compiled here."""
        return self._compiled.get(key)

    def compile(self, grid: tuple[int, int, int], key: Hashable, *args: object, **options: object) -> Any:
        """Launch as Triton does, and remember the form under ``key`` unless that is None."""
        compiled = self._kernel[grid](*args, **options)
        if INTERPRETED or key is None:
            return None
        self._compiled[key] = compiled
        return compiled


@dataclass(slots=True, eq=False)
class Launch:
    """A launch that is repeated with other tensors of the same shapes, strides and types."""

    launcher: Launcher
    grid: tuple[int, int, int]
    key: Hashable
    takes: Callable[[Sequence[Any]], tuple[Any, ...]]
    """Which of a call's tensors are the kernel's first arguments."""
    rest: tuple[object, ...]
    """Its other arguments."""
    options: Mapping[str, object] = field(default_factory=dict)
    _plain_rest: tuple[object, ...] = ()
    _run: Callable[..., None] | None = None
    """Takes a grid, a stream, then handles and the kernel's arguments; None before the form is compiled."""
    _handles: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        self._plain_rest = tuple(map(_plain, self.rest))
        self._bind(self.launcher.compiled(self.key))

    def _bind(self, compiled: Any) -> None:
        if compiled is not None:
            self._run, self._handles = compiled.run, _handles(compiled)

    def __call__(self, tensors: Sequence[object], addresses: Sequence[object], aligned: bool, stream: Any) -> None:
        """Launch with these tensors, which are at these addresses."""
        if aligned and self._run is not None:
            self._run(*self.grid, stream, *self._handles, *self.takes(addresses), *self._plain_rest)
        else:
            key = self.key if aligned else None  # Triton has to see which one is not
            self._bind(self.launcher.compile(self.grid, key, *self.takes(tensors), *self.rest, **self.options))


def launch_all(launches: Sequence[Launch], tensors: Sequence[torch.Tensor | None], device: torch.device) -> None:
    """Launch one after the other with the tensors of one call, on the current stream of their device."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    joined = 0
    for address in addresses[:ALIGNED]:
        joined |= address or 0
    with on(device):
        stream = 0 if INTERPRETED else _stream(device.index)
        for launch in launches:
            launch(tensors, addresses, joined % ALIGNMENT == 0, stream)


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


def _plain(arg: object) -> object:
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg


def _stream(device: int | None) -> Any:
    return driver.active.get_current_stream(device)


def _handles(compiled: Any) -> tuple[object, ...]:
    return (compiled.function, compiled.packed_metadata, None, None, None)
