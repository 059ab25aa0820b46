"""Cached blocks as branches: runs of one path that were released together and share a fate.

A prefix tree is released path by path, so that its cached part falls into few runs of blocks, each a piece of one
path, leaf first. A policy judges branches, not blocks; here is what all such policies share. Children go before parents
whatever the policy thinks: a branch is worth at least as much as any branch that hangs on it, and among equals the one
released first, which is the child, goes first.

    log        releases in order; an entry is live while ``position[block]`` points at it
    branch     by block, the row of ``table`` for the branch that it was last released in, -1 if it was evicted since
    table      one row a branch, in order of release: its entries of the log, how many are live, and what a policy adds

Ranking every branch costs what sorting them costs, so a ranking is kept and used up: it lists a 32nd of the cached
blocks, and what was released since is not in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .interface import Blocks, Prefixes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

QUEUE_SHARE = 32
_FIELDS = [("start", np.int32), ("end", np.int32), ("live", np.int32)]
_NONE: Blocks = np.zeros(0, dtype=np.int32)


class Branches:
    """Keeps the branches of one tier and ranks them by what a subclass makes of each."""

    fields: tuple[tuple[str, Any], ...] = ()
    """Columns that a subclass adds to the table."""
    remembered = 0
    """Rows that are kept after the last block of their branch was hit or evicted, newest first."""

    def __init__(self, num_blocks: int, prefixes: Prefixes) -> None:
        self.prefixes = prefixes
        self.position = np.full(num_blocks, -1, dtype=np.int32)
        self.branch = np.full(num_blocks, -1, dtype=np.int32)
        self.table = np.zeros(256 + self.remembered, dtype=[*_FIELDS, *self.fields])
        self.rows = 0
        self.cached = 0
        self._log = np.zeros(2 * num_blocks + 64, dtype=np.int32)
        self._tail = 0
        self._queue = _NONE  # of the ranking in use: blocks, and where they were in the log
        self._queue_at = _NONE
        self._head = 0
        self._changes = 0
        self._ranked: tuple[int, Blocks] = (-1, _NONE)  # a ranking and the count of changes that it is of

    # What a subclass says -------------------------------------------------------------------------------------------

    def worth(self, rows: Ints) -> Floats:
        """What the branches in these rows of the table are worth keeping; the least is evicted first."""
        raise NotImplementedError

    def release(self, path: Blocks) -> None:
        """Blocks of one path were released, leaf first and without gaps: append them as one or more branches."""
        raise NotImplementedError

    def forget(self, rows: Ints) -> None:
        """Rows that are dropped from the table."""

    def renumber(self, new: Blocks) -> None:
        """Rows got other numbers: ``new[row]``, -1 for those that were dropped."""

    # The policy -----------------------------------------------------------------------------------------------------

    def insert(self, blocks: Blocks) -> None:
        """Split into paths, and append each."""
        if not len(blocks):
            return
        self._changes += 1
        if self._tail + len(blocks) > len(self._log):
            self._compact_log()
        ends = np.flatnonzero(self.prefixes.parents[blocks[:-1]] != blocks[1:]) + 1
        start = 0
        for end in (*ends.tolist(), len(blocks)):
            self.release(blocks[start:end])
            start = end

    def hit(self, blocks: Blocks) -> None:
        """The upper part of each branch leaves it."""
        rows, where, counts = np.unique(self.branch[blocks], return_inverse=True, return_counts=True)
        first = np.full(len(rows), len(self._log), dtype=np.int32)
        np.minimum.at(first, where, self.position[blocks])
        self.table["end"][rows] = np.minimum(self.table["end"][rows], first)
        self._leave(blocks, rows, counts)

    def evict(self, blocks: Blocks) -> None:
        """Take them off the ranking, or adopt the one that they were offered from."""
        if not len(blocks):
            return
        if len(self._queued(len(blocks))) < len(blocks):
            self._queue = self._ranking(self._share())[: self._share()]
            self._queue_at = self.position[self._queue]
            self._head = 0
        rows, counts = np.unique(self.branch[blocks], return_counts=True)
        self._leave(blocks, rows, counts)
        self.branch[blocks] = -1
        while self._head < len(self._queue) and self.position[self._queue[self._head]] < 0:
            self._head += 1

    def victims(self, count: int) -> Blocks:
        """From the ranking in use, or from a new one if that is used up."""
        queued = self._queued(count)
        return queued if len(queued) == count else self._ranking(count)[:count].copy()

    # Inside ---------------------------------------------------------------------------------------------------------

    def append(self, blocks: Blocks, **values: Any) -> int:
        """A new branch of these blocks, leaf first. Returns its row."""
        if self.rows == len(self.table):
            self._compact_table()
        row, end = self.rows, self._tail + len(blocks)
        self.table[row] = 0
        self.table["start"][row], self.table["end"][row], self.table["live"][row] = self._tail, end, len(blocks)
        for name, value in values.items():
            self.table[name][row] = value
        self._log[self._tail : end] = blocks
        self.position[blocks] = np.arange(self._tail, end, dtype=np.int32)
        self.branch[blocks] = row
        self._tail = end
        self.rows += 1
        self.cached += len(blocks)
        return row

    def _leave(self, blocks: Blocks, rows: Blocks, counts: Ints) -> None:
        self._changes += 1
        self.table["live"][rows] -= counts.astype(np.int32)
        self.position[blocks] = -1
        self.cached -= len(blocks)

    def _share(self) -> int:
        return self.cached // QUEUE_SHARE + 64

    def _queued(self, count: int) -> Blocks:
        """Up to ``count`` blocks of the ranking in use."""
        found: list[Blocks] = []
        start = self._head
        while count > 0 and start < len(self._queue):
            stop = start + 2 * count + 16
            blocks = self._queue[start:stop]
            found.append(blocks[self.position[blocks] == self._queue_at[start:stop]][:count])
            count -= len(found[-1])
            start = stop
        return np.concatenate(found) if found else _NONE

    def _ranking(self, count: int) -> Blocks:
        """At least ``count`` blocks in order of eviction, as of now."""
        changes, ranked = self._ranked
        if changes != self._changes or len(ranked) < min(count, self.cached):
            ranked = self._rank(max(count, self._share()))
            self._ranked = (self._changes, ranked)
        return ranked

    def _rank(self, count: int) -> Blocks:
        rows = np.flatnonzero(self.table["live"][: self.rows])
        order = rows[np.lexsort((rows, self._raised(rows)))]
        enough = int(np.searchsorted(np.cumsum(self.table["live"][order]), count)) + 1
        chosen = self.table[order[:enough]]
        sizes = (chosen["end"] - chosen["start"]).astype(np.int64)
        ends = np.cumsum(sizes)
        at = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(chosen["start"] - (ends - sizes), sizes)
        blocks = self._log[at]
        ranked: Blocks = blocks[self.position[blocks] == at]
        return ranked

    def _raised(self, rows: Ints) -> Floats:
        """Worth of these rows, raised to that of what hangs on them."""
        worth = np.zeros(self.rows)
        worth[rows] = self.worth(rows)
        above = self.prefixes.parents[self._log[self.table["end"][rows] - 1]]
        held = self.position[above] >= 0
        children, parents = rows[held], self.branch[above[held]]
        while (worth[parents] < worth[children]).any():
            np.maximum.at(worth, parents, worth[children])
        return worth[rows]

    def _compact_log(self) -> None:
        entries = self._log[: self._tail]
        live = self.position[entries] == np.arange(self._tail)
        moved = np.concatenate([[0], np.cumsum(live)]).astype(np.int32)
        for bound in ("start", "end"):
            self.table[bound][: self.rows] = moved[self.table[bound][: self.rows]]
        kept = entries[live]
        self._tail = len(kept)
        self._log[: self._tail] = kept
        self.position[kept] = np.arange(self._tail, dtype=np.int32)
        self._queue = self._queue_at = _NONE

    def _compact_table(self) -> None:
        kept = self.table["live"][: self.rows] > 0
        kept[self.rows - self.remembered :] |= self.remembered > 0
        if kept.sum() > len(kept) // 2:
            grown = np.zeros(2 * len(self.table), dtype=self.table.dtype)
            grown[: self.rows] = self.table
            self.table = grown
            return
        self.forget(np.flatnonzero(~kept))
        new = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        known = self.branch >= 0
        self.branch[known] = new[self.branch[known]]
        rows = int(kept.sum())
        self.table[:rows] = self.table[: self.rows][kept]
        self.rows = rows
        self.renumber(new)
