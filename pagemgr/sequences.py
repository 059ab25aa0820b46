"""Sequences: one row of the block table each, and how far each has come.

committed ≤ computed ≤ reserved, in tokens:

    reserved    slots that belong to the sequence, those of steps in flight included
    computed    K and V are written: the steps that wrote them were committed
    committed   their token ids are known as well; only these can be matched by others

State is flat arrays by row. A handle carries the row's generation, so that a handle kept too long is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np

from .errors import InvalidInput, OutOfSequences, SequenceBusy, StaleSequence, WrongTier
from .plan import Ints
from .prefix import TokenArray

IDLE = 0
MOVING = -1


@dataclass(frozen=True, slots=True)
class Sequence:
    """A handle to one token stream. ``num_cached_tokens`` were found in the prefix cache when it was added."""

    row: int
    generation: int
    num_cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What ``add`` was given: the ids, and the names of their full blocks, so that no token is hashed twice."""

    tokens: TokenArray
    names: list[bytes]


class SequenceTable:
    """The rows. Reference counts are not kept here: who changes a row's blocks tells the pool."""

    def __init__(self, max_sequences: int, width: int, tier_names: tuple[str, ...]) -> None:
        self.blocks = np.zeros((max_sequences, width), dtype=np.int32)
        """The block table; beyond ``num_blocks`` entries a row holds the null block."""
        self.num_blocks = np.zeros(max_sequences, dtype=np.int64)
        self.reserved = np.zeros(max_sequences, dtype=np.int64)
        self.computed = np.zeros(max_sequences, dtype=np.int64)
        self.committed = np.zeros(max_sequences, dtype=np.int64)
        self.generation = np.zeros(max_sequences, dtype=np.int64)
        self.live = np.zeros(max_sequences, dtype=np.bool_)
        self.tier = np.zeros(max_sequences, dtype=np.uint8)
        self.last_step = np.full(max_sequences, IDLE, dtype=np.int64)
        """Newest step in flight, ``IDLE``, or ``MOVING`` between tiers."""
        self.roots: dict[int, bytes] = {}
        self.prompts: dict[int, Prompt] = {}
        self._tier_names = tier_names
        self._free = list(range(max_sequences - 1, -1, -1))

    @property
    def num_live(self) -> int:
        """Sequences there are."""
        return len(self.generation) - len(self._free)

    def require(self, count: int) -> None:
        """Raise ``OutOfSequences`` unless ``count`` rows are left."""
        if count > len(self._free):
            raise OutOfSequences(count, len(self._free), len(self.generation))

    def create(self, root: bytes) -> int:
        """An empty row of the first tier."""
        row = self._free.pop()
        self.live[row] = True
        self.tier[row] = 0
        self.roots[row] = root
        return row

    def clone(self, row: int) -> int:
        """A new row with the same content. The caller adds the references."""
        child = self.create(self.roots[row])
        n = self.num_blocks[row]
        self.blocks[child, :n] = self.blocks[row, :n]
        for column in (self.num_blocks, self.reserved, self.computed, self.committed, self.tier):
            column[child] = column[row]
        if row in self.prompts:
            self.prompts[child] = self.prompts[row]
        return child

    def destroy(self, rows: Ints) -> None:
        """Empty these rows; their handles become stale."""
        for column in (self.num_blocks, self.reserved, self.computed, self.committed):
            column[rows] = 0
        self.last_step[rows] = IDLE
        self.live[rows] = False
        self.generation[rows] += 1
        for row in rows.tolist():
            self.blocks[row] = 0
            del self.roots[row]
            self.prompts.pop(row, None)
            self._free.append(row)

    def handle(self, row: int, num_cached_tokens: int = 0) -> Sequence:
        """The handle of a live row."""
        return Sequence(row, int(self.generation[row]), num_cached_tokens)

    def rows(self, sequences: Iterable[Sequence]) -> Ints:
        """Rows of these handles. Raises ``StaleSequence``, or ``InvalidInput`` if one is named twice."""
        handles = list(sequences)
        rows = np.array([handle.row for handle in handles], dtype=np.int64)
        generations = np.array([handle.generation for handle in handles], dtype=np.int64)
        known = (rows >= 0) & (rows < len(self.live))
        here = np.where(known, rows, 0)
        stale = ~known | ~self.live[here] | (self.generation[here] != generations)
        if stale.any():
            handle = handles[int(np.flatnonzero(stale)[0])]
            raise StaleSequence(handle.row, handle.generation)
        if len(set(rows.tolist())) != len(rows):
            raise InvalidInput("a sequence is named twice in one call")
        return rows

    def require_tier(self, rows: Ints, tier: int) -> None:
        """Raise ``WrongTier`` unless all rows are in this tier."""
        for row in rows[self.tier[rows] != tier].tolist():
            raise WrongTier(row, self._tier_names[self.tier[row]], self._tier_names[tier])

    def require_idle(self, rows: Ints, verb: str) -> None:
        """Raise ``SequenceBusy`` if any row has steps in flight or is moving."""
        for row in rows[self.last_step[rows] != IDLE].tolist():
            moving = self.last_step[row] == MOVING
            raise SequenceBusy(
                row, verb, "it is being swapped" if moving else f"step {self.last_step[row]} is in flight"
            )

    def require_still(self, rows: Ints, verb: str) -> None:
        """Raise ``SequenceBusy`` if any row is moving between tiers."""
        self.require_idle(rows[self.last_step[rows] == MOVING], verb)

    def blocks_leaf_first(
        self, rows: Rows[int], keep: Rows[int] | None = None
    ) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Blocks of these rows, tail first, leaving each row's first ``keep`` alone."""
        kept = keep if keep is not None else [0] * len(rows)
        tails = [self.blocks[row, k : self.num_blocks[row]][::-1] for row, k in zip(rows, kept, strict=True)]
        return np.concatenate(tails) if tails else np.zeros(0, dtype=np.int32)

    def references(self, tier: int, num_blocks: int) -> Ints:
        """int64 ``[num_blocks]``: table entries of this tier that name each block."""
        rows = np.flatnonzero(self.live & (self.tier == tier))
        return np.bincount(self.blocks_leaf_first(rows.tolist()), minlength=num_blocks).astype(np.int64)
