"""How long steps, swaps and kernels take, measured where the bytes move.

On the CPU the host's clock is read. On a GPU two events are recorded in the stream, and the time between them is read
when both have passed, in a later ``lap`` of the same engine: nothing waits, and who reads the histograms calls no CUDA
function. Marking one step on a GPU takes the host some 70 µs, which is why only some are.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping

import torch

from .stats import Histogram

TIMED = {
    "step": ("decode", "prefill"),
    "kernel": ("write_kv", "decode", "prefill", "copy_blocks"),
    "swap": ("out", "in"),
    "host_cache": ("out", "in"),
}
"""What is timed, by operation. A step is a prefill if any of its sequences has more than one new token."""

ONE_IN = {"step": 13, "kernel": 13, "swap": 1, "host_cache": 13}
"""How many are passed over for each that is timed; no multiple of what an engine may do every so many steps."""

Mark = float | torch.cuda.Event
"""A moment: of the host's clock, or in a stream."""

_log = logging.getLogger("pagemgr")


class Timings:
    """Histograms of what one cache does. If the device cannot be timed, that is logged, and timing ends."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._enabled = enabled
        self._histograms = {operation: {kind: Histogram() for kind in kinds} for operation, kinds in TIMED.items()}
        self._calls = dict.fromkeys(TIMED, 0)
        self._pending: deque[tuple[Histogram, torch.cuda.Event, torch.cuda.Event, dict[str, object]]] = deque()
        self._lock = threading.Lock()

    def start(self, operation: str) -> Mark | None:
        """Now, if this one is to be timed."""
        self._calls[operation] = calls = self._calls[operation] + 1
        return None if calls % ONE_IN[operation] else self.now()

    def now(self) -> Mark | None:
        """None where nothing is timed: if that is off, and while a CUDA graph is captured."""
        if not self._enabled:
            return None
        if not self._on_gpu:
            return time.perf_counter()
        try:
            if torch.cuda.is_current_stream_capturing():
                return None
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            return event
        except RuntimeError:
            self._give_up()
            return None

    def lap(self, operation: str, kind: str, since: Mark | None, **labels: object) -> Mark | None:
        """Count the time since a mark under one of ``TIMED``, and return the mark for what follows.

        ``labels`` say which one it was; they are kept for one duration of each bucket. Does nothing without a mark.
        """
        if since is None or (now := self.now()) is None:
            return None
        histogram = self._histograms[operation][kind]
        with self._lock:
            if isinstance(since, float) and isinstance(now, float):
                histogram.add(now - since, labels, time.time())
            elif isinstance(since, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
                self._pending.append((histogram, since, now, labels))
                self._collect()
        return now

    def snapshot(self) -> Mapping[str, Mapping[str, Histogram]]:
        """The histograms as they are now; none if timing is off."""
        if not self._enabled:
            return {}
        with self._lock:
            return {
                operation: {kind: histogram.copy() for kind, histogram in kinds.items()}
                for operation, kinds in self._histograms.items()
            }

    def _collect(self) -> None:
        """Count what has passed, oldest first."""
        try:
            while self._pending and self._pending[0][2].query():  # type: ignore[no-untyped-call]
                histogram, since, until, labels = self._pending.popleft()
                histogram.add(since.elapsed_time(until) / 1e3, labels, time.time())
        except RuntimeError:
            self._give_up()

    def _give_up(self) -> None:
        self._enabled = False
        _log.exception("%s cannot be timed: timing ends here", self._device)


def current_trace() -> dict[str, object]:
    """The trace that the caller is part of, if it uses OpenTelemetry: a slow swap then leads to its request."""
    current_span = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current_span is None:
        return {}
    context = current_span().get_span_context()
    return {"trace_id": format(context.trace_id, "032x")} if context.is_valid else {}
