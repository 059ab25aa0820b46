"""The bytes: one block-major tensor for each tier, and the only place that moves whole blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .backends.interface import Backend, KVLayer
from .layout import NULL_BLOCK, BlockLayout
from .plan import Copies
from .pool import Fence
from .timings import Timings, current_trace


class Storage:
    """Tensors ``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``, by tier.

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
    ) -> None:
        self.layout = layout
        self.device = device
        self._backend = backend
        self._timings = Timings(device) if timings is None else timings
        dtype = getattr(torch, layout.dtype.value)
        self.tiers: dict[str, torch.Tensor] = {}
        for name, blocks in num_blocks.items():
            shape = (blocks, *layout.shape)
            on_host = name != "device"
            self.tiers[name] = torch.empty(
                shape, dtype=dtype, device="cpu" if on_host else device, pin_memory=on_host and device.type == "cuda"
            )
            self.tiers[name][NULL_BLOCK] = 0
        pool = self.tiers["device"]
        self.layers = tuple(KVLayer(pool[:, i, 0], pool[:, i, 1]) for i in range(layout.num_layers))
        """Views of the device tier, one for each layer."""

    def execute(self, copies: Sequence[Copies], swapping: str | None = None) -> Fence | None:
        """Move these blocks, in order, on the device's current stream.

        ``swapping`` is the direction, "out" or "in", of the swap that they belong to, whose time is counted as such;
        other copies between tiers are those of the host cache. Returns the event after which the sources may be
        overwritten, None if that is now.
        """
        for group in copies:
            blocks = len(group.pairs)
            if group.source == group.target:
                start = self._timings.start("kernel")
                pairs = torch.from_numpy(group.pairs.astype(np.int64))
                pool = self.tiers[group.source]
                self._backend.copy_blocks(pool, pairs.to(pool.device, non_blocking=True))
                self._timings.lap("kernel", "copy_blocks", start, blocks=blocks)
            else:
                direction = "in" if group.target == "device" else "out"
                operation = "swap" if direction == swapping else "host_cache"
                start = self._timings.start(operation)
                self._move(self.tiers[group.source], self.tiers[group.target], group.pairs)
                self._timings.lap(operation, direction, start, blocks=blocks, **current_trace())
        if self.device.type != "cuda" or not copies:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _move(
        self, source: torch.Tensor, target: torch.Tensor, pairs: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    ) -> None:
        """Between tiers: one copy for each run of blocks that lie side by side on both sides."""
        breaks = np.flatnonzero((np.diff(pairs, axis=0) != 1).any(axis=1)) + 1
        for run in np.split(pairs, breaks):
            (start, to), n = run[0].tolist(), len(run)
            target[to : to + n].copy_(source[start : start + n], non_blocking=True)
