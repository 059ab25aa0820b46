"""Sequences: one row of the block table each, and how far each has come.

committed ≤ computed ≤ reserved, in tokens:

    reserved    slots that belong to the sequence, those of steps in flight included
    computed    K and V are written: the steps that wrote them were committed
    committed   their token ids are known as well; only these can be matched by others

State is flat arrays by row. A handle carries the row's generation, so that a handle kept too long is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .errors import InvalidInput, OutOfSequences, SequenceBusy, StaleSequence, WrongTier
from .eviction import Blocks
from .ids import TokenArray
from .layout import NULL_BLOCK
from .plan import Ints
from .pool import tally
from .prefix import DIGEST_BYTES

IDLE = 0
MOVING = -1


@dataclass(frozen=True, slots=True)
class Sequence:
    """A handle to one token stream. ``num_cached_tokens`` were found in the prefix cache when it was added."""

    row: int
    generation: int
    num_cached_tokens: int = field(default=0, compare=False)


class Batch:
    """Sequences that step together. Made once and passed again and again, it spares each call the walk over handles.

    Raises ``InvalidInput`` if a sequence is named twice.
    """

    __slots__ = ("generations", "rows", "sequences")

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = tuple(sequences)
        self.rows = np.array([handle.row for handle in self.sequences], dtype=np.int64)
        self.generations = np.array([handle.generation for handle in self.sequences], dtype=np.int64)
        if len(set(zip(self.rows.tolist(), self.generations.tolist(), strict=True))) != len(self.rows):
            raise InvalidInput("a sequence is named twice in one call")

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What ``add`` was given: the ids, and the packed names of their full blocks, so that no token is hashed twice."""

    tokens: TokenArray
    names: bytes


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
        self.roots = np.zeros((max_sequences, DIGEST_BYTES), dtype=np.uint8)
        """The name before each row's first block: its namespace."""
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
        self.roots[row] = np.frombuffer(root, dtype=np.uint8)
        return row

    def clone(self, row: int, n: int) -> list[int]:
        """``n`` new rows with the same content. The caller adds the references."""
        root = self.roots[row].tobytes()
        children = [self.create(root) for _ in range(n)]
        used = self.num_blocks[row]
        self.blocks[children, :used] = self.blocks[row, :used]
        for column in (self.num_blocks, self.reserved, self.computed, self.committed, self.tier):
            column[children] = column[row]
        if row in self.prompts:
            for child in children:
                self.prompts[child] = self.prompts[row]
        return children

    def destroy(self, rows: Ints) -> None:
        """Empty these rows; their handles become stale."""
        for column in (self.num_blocks, self.reserved, self.computed, self.committed):
            column[rows] = 0
        self.last_step[rows] = IDLE
        self.live[rows] = False
        self.generation[rows] += 1
        self.blocks[rows] = NULL_BLOCK
        self.vacate(rows)

    def vacate(self, rows: Ints) -> None:
        """These emptied rows can be taken anew."""
        for row in rows.tolist():
            self.prompts.pop(row, None)
            self._free.append(row)

    def handle(self, row: int, num_cached_tokens: int = 0) -> Sequence:
        """The handle of a live row."""
        return Sequence(row, int(self.generation[row]), num_cached_tokens)

    def rows(self, sequences: Iterable[Sequence] | Batch) -> Ints:
        """Rows of these handles. Raises ``StaleSequence``, or ``InvalidInput`` if one is named twice."""
        batch = sequences if isinstance(sequences, Batch) else Batch(sequences)
        rows = batch.rows
        known = (rows >= 0) & (rows < len(self.live))
        here = np.where(known, rows, 0)
        stale = ~known | ~self.live[here] | (self.generation[here] != batch.generations)
        if stale.any():
            handle = batch.sequences[int(np.flatnonzero(stale)[0])]
            raise StaleSequence(handle.row, handle.generation)
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

    def leaf_first(self, rows: Ints, keep: Ints) -> tuple[Blocks, Ints | int]:
        """Distinct blocks of these rows, children before parents, and how often each is named.

        Each row's first ``keep`` blocks are left alone.
        """
        kept = keep.tolist()
        tails = [self.blocks[row, k : self.num_blocks[row]][::-1] for row, k in zip(rows.tolist(), kept, strict=True)]
        return (tails[0].copy(), 1) if len(tails) == 1 else tally(np.concatenate([*tails, np.zeros(0, dtype=np.int32)]))

    def references(self, tier: int, num_blocks: int) -> Ints:
        """int64 ``[num_blocks]``: table entries of this tier that name each block."""
        rows = np.flatnonzero(self.live & (self.tier == tier))
        named = np.arange(self.blocks.shape[1]) < self.num_blocks[rows, None]
        return np.bincount(self.blocks[rows][named], minlength=num_blocks).astype(np.int64)
