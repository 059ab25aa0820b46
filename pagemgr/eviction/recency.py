"""Least recently released first."""

from __future__ import annotations

import numpy as np

from .interface import Blocks


class LRU:
    """Least recently released first: order by time of release and nothing else.

    An append-only log of releases; an entry is live while ``position[block]`` still points at it, so that a hit costs
    one array write and no search. The log is twice the pool, so compaction is amortised over as many releases.
    """

    def __init__(self, num_blocks: int) -> None:
        self._log = np.zeros(2 * num_blocks + 64, dtype=np.int32)
        self._position = np.full(num_blocks, -1, dtype=np.int64)
        self._head = 0
        self._tail = 0

    def insert(self, blocks: Blocks) -> None:
        """Append to the log."""
        if self._tail + len(blocks) > len(self._log):
            self._compact()
        end = self._tail + len(blocks)
        self._log[self._tail : end] = blocks
        self._position[blocks] = np.arange(self._tail, end)
        self._tail = end

    def hit(self, blocks: Blocks) -> None:
        """Orphan the log entries of these blocks."""
        self._position[blocks] = -1

    def evict(self, blocks: Blocks) -> None:
        """Orphan the log entries of these blocks."""
        self._position[blocks] = -1

    def victims(self, count: int) -> Blocks:
        """The live entries nearest the head."""
        found: list[Blocks] = []
        start, missing = self._head, count
        while missing > 0 and start < self._tail:
            stop = min(self._tail, start + max(2 * missing, 64))
            live = self._live(start, stop)
            if not found and not len(live):
                self._head = stop  # only dead entries so far: never read them again
            found.append(live[:missing])
            missing -= len(found[-1])
            start = stop
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    def _live(self, start: int, stop: int) -> Blocks:
        entries = self._log[start:stop]
        live: Blocks = entries[self._position[entries] == np.arange(start, stop)]
        return live

    def _compact(self) -> None:
        live = self._live(self._head, self._tail)
        self._head, self._tail = 0, len(live)
        self._log[: len(live)] = live
        self._position[live] = np.arange(len(live))
