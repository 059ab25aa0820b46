"""Least expected hits for the room and time that they cost: LHD (Beckmann et al., NSDI 2018), by branch of the tree.

A block is worth keeping for the hits that it will bring, divided by how long it has to be kept for them. ``returns``
learns from what happened how likely a branch comes back at each age; here is what a branch is known by:

    turns      how often its path was continued before: who came back is likelier to come back again
    grown      how many blocks the last turn added, in powers of two
    pace       how long its turns were apart, a running mean of the logarithm
    stem       many paths go on from here: a system prompt, which has a pace of its own
    passed     a path came back to the upper part and left this part behind

Time is counted in blocks released, so that it stands still when nothing happens. A path that comes back is recognised
even if it was evicted, by the names of a few of its blocks; without that, what never stays long enough to be hit could
never be seen to come back.

Worth is rounded to half octaves, and within one the least recently released goes first: where little is to be gained,
this is LRU.
"""

from __future__ import annotations

import numpy as np

from .branches import Branches, Floats, Ints
from .interface import Blocks, Prefixes
from .returns import NUM_TURNS, Returns

STEM_CHILDREN = 4
"""Paths that go on from a block: a conversation continued, retried, and with its lost answers has fewer."""
MEMORY = 4096
"""Branches remembered at least, in addition to one for each 16 blocks of the tier."""
LOOK_AGAIN = 64, 1024
"""Fewest and most branches between two looks at what was learned; between them, a sixteenth of all branches so far."""


_MARKS = np.array([*range(8), *((8 + step) << octave for octave in range(24) for step in range(8))])
"""Distances from the leaf at which blocks are marked, so that who comes back short of the end is recognised as well."""


class HitDensity(Branches):
    """Evicts the branch with the least expected hits per block and time."""

    fields = (
        ("released", np.int64),  # when, in blocks released
        ("size", np.int32),  # blocks when it was released
        ("open", np.int32),  # those of them that did not come back yet, evicted or not
        ("back", np.int64),  # when some of them were hit, 0 if none were since the release before
        ("turns", np.int32),
        ("pace", np.float32),
        ("kind", np.int32),  # of ``returns``
    )

    def __init__(self, num_blocks: int, prefixes: Prefixes) -> None:
        self.remembered = MEMORY + num_blocks // 16
        super().__init__(num_blocks, prefixes)
        self._now = 0
        self._children = np.zeros(num_blocks, dtype=np.uint8)
        ghosts = 1 << max(16, (num_blocks // 2).bit_length())
        self._ghosts = np.zeros((ghosts, 2), dtype=np.uint32)  # key of a name and 1 + row, by the low bits of the key
        self._returns = Returns()
        self._released = 0  # branches
        self._look_at = LOOK_AGAIN[0]

    # What happens to branches ---------------------------------------------------------------------------------------

    def hit(self, blocks: Blocks) -> None:
        """Their branches came back now; what of it came back is known when the path is released."""
        super().hit(blocks)
        self.table["back"][self.branch[blocks]] = self._now

    def evict(self, blocks: Blocks) -> None:
        """The branch is remembered, the block is not."""
        super().evict(blocks)
        self._children[blocks] = 0

    def release(self, path: Blocks) -> None:
        """A branch of what is this path's own, and one of each branch that the stem above it was in."""
        self._recognise(path)
        turns, paces = self._come_back(path)
        own = self._own(path)
        seen = np.flatnonzero(self.branch[path] >= 0)
        grown = int(seen[0]) if len(seen) else len(path)
        pieces = [0] if own else []
        pieces += (own + _starts(self.branch[path[own:]])).tolist()
        for start, end in zip(pieces, [*pieces[1:], len(path)], strict=True):
            if start < own:  # new, unless its path came back
                turn, pace = (turns[grown], paces[grown]) if grown < own else (0, 0.0)
                kind = self._returns.kind(turn, min(grown, own), pace)
            else:
                turn, pace = turns[start], paces[start]
                kind = self._returns.kind(NUM_TURNS - 1, 0, pace)
            self._keep(path[start:end], turn, pace, kind)
        self._now += len(path)
        if self._released >= self._look_at:
            self._look_at = self._released + min(max(self._released // 16, LOOK_AGAIN[0]), LOOK_AGAIN[1])
            self._returns.learn(*self._waiting(slice(0, self.rows)), self._now / self._released)

    def worth(self, rows: Ints) -> Floats:
        """Expected hits per block and time, in half octaves."""
        table = self.table[rows]
        density = self._returns.density(table["kind"], self._now - table["released"])
        half_octaves: Floats = np.floor(2 * np.log2(density))
        return half_octaves

    def forget(self, rows: Ints) -> None:
        """What did not come back so far counts as not having come back."""
        self._returns.stay(*self._waiting(rows))

    def renumber(self, new: Blocks) -> None:
        """The ghosts follow."""
        rows = self._ghosts[:, 1]
        held = rows > 0
        rows[held] = 1 + new[rows[held] - 1]

    # Inside ---------------------------------------------------------------------------------------------------------

    def _keep(self, blocks: Blocks, turns: int, pace: float, kind: int) -> None:
        size = len(blocks)
        row = self.append(
            blocks, released=self._now, size=size, open=size, turns=turns, pace=np.float32(pace), kind=kind
        )
        self._released += 1
        keys = self._keys(blocks[_MARKS[: np.searchsorted(_MARKS, size)]])
        slots = keys & (len(self._ghosts) - 1)
        self._ghosts[slots, 0] = keys
        self._ghosts[slots, 1] = 1 + row

    def _recognise(self, path: Blocks) -> None:
        """Find the branches that blocks of a path were in before they were evicted."""
        new = np.flatnonzero(self.branch[path] < 0)
        if not len(new):
            return
        keys = self._keys(path[new])
        ghosts = self._ghosts[keys & (len(self._ghosts) - 1)]
        known = np.where(ghosts[:, 0] == keys, ghosts[:, 1].astype(np.int64) - 1, -1)
        # A block between two marks of a branch was in it as well: from each mark on towards the root.
        marks = np.maximum.accumulate(np.where(known >= 0, np.arange(len(known)), -1))
        rows = np.where(marks >= 0, known[marks], -1).astype(np.int32)
        self.branch[path[new]] = rows
        fresh = path[new[rows < 0]]
        joints = self.prefixes.parents[fresh]
        self._children[joints] = np.minimum(self._children[joints], 254) + 1

    def _own(self, path: Blocks) -> int:
        """Blocks of a path, from its leaf, that are below every stem."""
        stems = np.flatnonzero(self._children[path] >= STEM_CHILDREN)
        return int(stems[0]) if len(stems) else len(path)

    def _come_back(self, path: Blocks) -> tuple[Ints, Floats]:
        """Count what came back of each branch that the path was in; the rest of it was passed.

        Returns, by block of the path, turns and pace of the branch it was in, with this turn; 0 for new blocks.
        """
        rows, where, counts = np.unique(self.branch[path], return_inverse=True, return_counts=True)
        new = int(len(rows) > 0 and rows[0] < 0)
        table, rows, counts = self.table, rows[new:], counts[new:]
        kinds, released, back = table["kind"][rows], table["released"][rows], table["back"][rows]
        ages = np.where(back > 0, back, self._now) - released
        counts = np.minimum(counts, table["open"][rows]).astype(np.int32)
        self._returns.come_back(kinds, ages, counts)
        self._returns.stay(kinds, ages, table["open"][rows] - counts)
        table["open"][rows] -= counts
        table["back"][rows] = 0
        table["kind"][rows] = self._returns.passed(kinds)
        turns = table["turns"][rows] + 1
        steps = np.log2(np.maximum(ages, 1))
        paces = np.where(turns == 1, steps, (steps + table["pace"][rows]) / 2)
        nothing = np.zeros(new)
        return np.concatenate([nothing, turns])[where].astype(np.int64), np.concatenate([nothing, paces])[where]

    def _waiting(self, rows: Ints | slice) -> tuple[Blocks, Ints, Blocks]:
        """Kinds, ages and open blocks of these rows."""
        table = self.table[rows]
        return table["kind"], self._now - table["released"], table["open"]

    def _keys(self, blocks: Blocks) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.ascontiguousarray(self.prefixes.names[blocks, :4]).view(np.uint32).reshape(-1)


def _starts(rows: Blocks) -> Ints:
    """Where each run of equal rows begins."""
    return np.flatnonzero(np.diff(rows, prepend=-2))
