"""Looks at one cache for many viewers: they share each look, and it keeps what a curve over time is drawn from."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from pagemgr.cache import PagedKVCache
from pagemgr.dump import Dump, take
from pagemgr.metrics import bytes_by_cause
from pagemgr.stats import Stats

from .listener import Listener

SHARED_SECONDS = 0.4
"""As long as this, everybody is shown the same look: a thousand viewers cost the pool as much as one."""
HISTORY_SECONDS = 1.0
"""Between two points of the curve."""
HISTORY_POINTS = 900


@dataclass(frozen=True, slots=True)
class Look:
    """A dump, and when it was taken: seconds since the epoch, for people to read."""

    time: float
    dump: Dump


class Reader:
    """Takes at most one dump in ``SHARED_SECONDS``. May be used from any thread."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.listener = Listener(cache.manager)
        self._lock = threading.Lock()
        self._look: Look | None = None
        self._age = 0.0
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_POINTS)
        self._next_point = 0.0

    def look(self) -> Look:
        """The pool now, or a moment ago."""
        with self._lock:
            now = time.monotonic()
            if self._look is None or now - self._age >= SHARED_SECONDS:
                self._look = Look(time.time(), take(self.cache.manager, self.cache.layout.block_bytes))
                self._age = now
                self._remember(self._look.dump.stats)
            return self._look

    def sample(self) -> None:
        """Remember a point of the curve, without a look at the blocks."""
        stats = self.cache.stats()
        with self._lock:
            self._remember(stats)

    def history(self) -> list[dict[str, Any]]:
        """A point for each second or so in which somebody looked or sampled, oldest first."""
        with self._lock:
            return list(self._history)

    def _remember(self, stats: Stats) -> None:
        now = time.monotonic()
        if now < self._next_point:
            return
        self._next_point = now + HISTORY_SECONDS
        self._history.append(
            {
                "time": round(time.time(), 3),
                "utilization": round(stats.device.utilization, 6),
                "query_tokens": stats.counters.prefix_query_tokens,
                "hit_tokens": stats.counters.prefix_hit_tokens,
                "bytes": bytes_by_cause(stats.device, self.cache.layout.block_bytes),
            }
        )
