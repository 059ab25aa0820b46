"""Looks at one cache for many viewers: they share each look, and it keeps what a curve over time is drawn from."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pagemgr.cache import PagedKVCache
from pagemgr.dump import Dump, take
from pagemgr.metrics import bytes_by_cause
from pagemgr.stats import Stats

SHARED_SECONDS = 0.4
"""As long as this, everybody is shown the same look: a thousand viewers cost the pool as much as one."""
HISTORY_SECONDS = 1.0
"""Between two points of the curve."""
HISTORY_POINTS = 900
SHOWN_EVENTS = 50
LOOKED_AT = 20_000
"""Newest events that are looked at, so that runs of them can be told in one line."""


class Event(Protocol):
    """One entry of the manager's event log, if it keeps one.

    ``manager.events`` iterates over them, oldest first, and may be iterated while the manager adds to it.
    """

    @property
    def number(self) -> int:
        """Consecutive, without gaps."""

    @property
    def kind(self) -> str:
        """``stored``, ``removed``, ``cleared`` or ``moved``."""

    @property
    def tier(self) -> str:
        """Where."""

    @property
    def blocks(self) -> int:
        """How many."""


@dataclass(frozen=True, slots=True)
class Look:
    """A dump, and when it was taken: seconds since the epoch, for people to read."""

    time: float
    dump: Dump


class Reader:
    """Takes at most one dump in ``SHARED_SECONDS``. May be used from any thread."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
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

    def events(self) -> list[dict[str, Any]] | None:
        """The newest events, newest first, runs of one kind in one tier as one; None if the manager keeps no log."""
        log: Iterable[Event] | None = getattr(self.cache.manager, "events", None)
        if log is None:
            return None
        runs: list[dict[str, Any]] = []
        for event in reversed(deque(log, maxlen=LOOKED_AT)):
            if runs and (runs[-1]["kind"], runs[-1]["tier"]) == (event.kind, event.tier):
                runs[-1]["first"] = event.number
                runs[-1]["blocks"] += event.blocks
            elif len(runs) == SHOWN_EVENTS:
                break
            else:
                runs.append(
                    {
                        "first": event.number,
                        "last": event.number,
                        "kind": event.kind,
                        "tier": event.tier,
                        "blocks": event.blocks,
                    }
                )
        return runs

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
