"""The bytes: one block-major tensor for each tier, and the only place that moves whole blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from .backends.interface import Backend, KVLayer
from .errors import InternalError
from .layout import NULL_BLOCK, BlockLayout
from .plan import Copies
from .pool import Fence
from .routes import Routes, copy_by_kernel
from .timings import Timings, current_trace
from .watch import Watch

_POISON = 0xFF
"""Of every byte: a NaN in each floating point type there is."""


class Storage:
    """Bytes, uint8 ``[num_blocks, num_layers, layer_bytes]``, by tier; ``KVLayer.of`` shows what they hold.

    The device tier lives on ``device``, every other in host memory, pinned where the device is a GPU. Nothing is
    initialised but the null block: what was never written may be anything.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: Mapping[str, int],
        device: torch.device,
        backend: Backend,
        timings: Timings | None = None,
        watches: Mapping[str, Watch] = MappingProxyType({}),
    ) -> None:
        self.layout = layout
        self._watches = watches
        self.device = device
        self._backend = backend
        self._timings = Timings(device) if timings is None else timings
        self.tiers: dict[str, torch.Tensor] = {}
        for name, blocks in num_blocks.items():
            shape = (blocks, layout.num_layers, layout.layer_bytes)
            if device.type == "cpu":
                # numpy asks for huge pages, torch does not: scattered blocks are read a fifth faster from them
                self.tiers[name] = torch.from_numpy(np.empty(shape, dtype=np.uint8))
            elif name == "device":
                self.tiers[name] = torch.empty(shape, dtype=torch.uint8, device=device)
            else:
                self.tiers[name] = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            self.tiers[name][NULL_BLOCK] = 0
        stored = getattr(torch, layout.stored)
        self.layers = tuple(KVLayer.of(layer, stored, layout.shape) for layer in self.tiers["device"].unbind(1))
        """Views of the device tier, one for each layer."""
        self._routes = Routes(self.tiers["device"], self.tiers.get("host"), backend)

    def execute(self, copies: Sequence[Copies], swapping: str | None = None) -> Fence | None:
        """Move these blocks, in order, on the device's current stream.

        ``swapping`` is the direction, "out" or "in", of the swap that they belong to, whose time is counted as such;
        other copies between tiers are those of the host cache. Returns the event after which the sources may be
        overwritten, None if that is now. Raises as ``audit``, before anything moves.
        """
        if self._watches:
            self.audit()
        for group in copies:
            blocks = len(group.pairs)
            if group.source == group.target:
                start = self._timings.start("kernel")
                pool = self.tiers[group.source]
                copy_by_kernel(self._backend, pool, pool, group.pairs)
                self._timings.lap("kernel", "copy_blocks", start, blocks=blocks)
            else:
                direction = "in" if group.target == "device" else "out"
                operation = "swap" if direction == swapping else "host_cache"
                start = self._timings.start(operation)
                self._routes.move(self.tiers[group.source], self.tiers[group.target], group.pairs)
                self._timings.lap(operation, direction, start, blocks=blocks, **current_trace())
        if self.device.type != "cuda" or not copies:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def audit(self) -> None:
        """Poison what is free, and see that what was given out is as it was poisoned, in the tiers that are watched.

        Raises ``InternalError`` for a block that was written after it was freed, or for a null block that was written.
        """
        for tier, watch in self._watches.items():
            whole = self.tiers[tier].view(self.tiers[tier].shape[0], -1).view(torch.uint8)
            for block in watch.to_inspect():
                if not bool((whole[block] == _POISON).all()):
                    raise watch.written(tier, block)
            if blank := watch.to_poison():
                whole[torch.tensor(blank, device=whole.device)] = _POISON
            if bool(whole[NULL_BLOCK].any()):
                raise InternalError(f"the null block of {tier} was written")
