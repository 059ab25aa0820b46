"""Policies that count uses: a block is used once when it is computed, and once more each time it is hit."""

from __future__ import annotations

import numpy as np

from .branches import Branches, Floats, Ints
from .interface import Blocks, Prefixes


class LFU(Branches):
    """Fewest uses first, least recently released first among equals. A count lives as long as its block is cached."""

    fields = (("uses", np.int64),)

    def __init__(self, num_blocks: int, prefixes: Prefixes) -> None:
        super().__init__(num_blocks, prefixes)
        self._uses = np.ones(num_blocks, dtype=np.int32)

    def hit(self, blocks: Blocks) -> None:
        """Count."""
        super().hit(blocks)
        self._uses[blocks] += 1

    def evict(self, blocks: Blocks) -> None:
        """Forget the counts."""
        super().evict(blocks)
        self._uses[blocks] = 1

    def release(self, path: Blocks) -> None:
        """A branch for each run of equal counts."""
        uses = self._uses[path]
        ends = (*(np.flatnonzero(np.diff(uses)) + 1).tolist(), len(path))
        start = 0
        for end in ends:
            self.append(path[start:end], uses=int(uses[start]))
            start = end

    def worth(self, rows: Ints) -> Floats:
        """The count."""
        return self.table["uses"][rows].astype(np.float64)


class S3FIFO(Branches):
    """S3-FIFO (Yang et al., SOSP 2023) on a prefix tree: a small queue that filters what is used only once.

    New blocks enter the small queue; those that are hit, or that come back soon after they were evicted from it, enter
    the main queue. As long as the small queue has more than a tenth of the cached blocks, it gives the victims. A place
    in a queue is that of the last release, because a parent must stay behind its children: what the original does by
    reinsertion when a block reaches the end of the main queue happens here when it is released.
    """

    fields = (("main", np.bool_),)

    def __init__(self, num_blocks: int, prefixes: Prefixes) -> None:
        super().__init__(num_blocks, prefixes)
        self._main = np.zeros(num_blocks, dtype=np.bool_)
        self._ghosts = np.zeros(1 << (num_blocks - 1).bit_length(), dtype=np.uint32)  # by the low bits of a name

    def hit(self, blocks: Blocks) -> None:
        """Promote."""
        super().hit(blocks)
        self._main[blocks] = True

    def evict(self, blocks: Blocks) -> None:
        """Remember the names of what was used only once."""
        super().evict(blocks)
        keys = self._keys(blocks[~self._main[blocks]])
        self._ghosts[keys & (len(self._ghosts) - 1)] = keys
        self._main[blocks] = False

    def release(self, path: Blocks) -> None:
        """A branch for each run in one queue."""
        new = path[(self.branch[path] < 0) & ~self._main[path]]
        keys = self._keys(new)
        self._main[new] = self._ghosts[keys & (len(self._ghosts) - 1)] == keys
        main = self._main[path]
        start = 0
        for end in (*(np.flatnonzero(np.diff(main)) + 1).tolist(), len(path)):
            self.append(path[start:end], main=bool(main[start]))
            start = end

    def worth(self, rows: Ints) -> Floats:
        """The queue whose turn it is is worth less."""
        main = self.table["main"][rows]
        small = int(self.table["live"][rows][~main].sum())
        return np.where(main == (10 * small <= self.cached), 0.0, 1.0)

    def _keys(self, blocks: Blocks) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.ascontiguousarray(self.prefixes.names[blocks, :4]).view(np.uint32).reshape(-1)
