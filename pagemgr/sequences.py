"""Sequences: one row of the block table for each layer group, and how far each has come.

committed ≤ computed ≤ reserved, in tokens:

    reserved    slots that belong to the sequence, those of steps in flight included
    computed    K and V are written: the steps that wrote them were committed
    committed   their token ids are known as well; only these can be matched by others

A row of a group with a window gives back the blocks that left it; its first ``dropped`` columns are null from then on.

State is flat arrays by row. The rows of group 0 come first, then those of group 1 and so on: sequence ``s`` has rows
``s``, ``s + max_sequences``, … A handle carries its rows' generation, so that a handle kept too long is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, OutOfSequences, SequenceBusy, StaleSequence, WrongTier
from .eviction import Blocks
from .ids import TokenArray
from .layout import NULL_BLOCK
from .plan import Ints
from .pool import tally
from .prefix import DIGEST_BYTES, group_roots

_Int = TypeVar("_Int", np.int64, np.int32)

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

    def __init__(
        self, max_sequences: int, width: int, tier_names: tuple[str, ...], windows: tuple[int | None, ...] = (None,)
    ) -> None:
        self.max_sequences = max_sequences
        self.windows = windows
        """By group: tokens that a token sees, itself included; None is all."""
        rows = max_sequences * len(windows)
        self.blocks = np.zeros((rows, width), dtype=np.int32)
        """The block table; left of ``dropped`` and from ``num_blocks`` on a row holds the null block."""
        self.num_blocks = np.zeros(rows, dtype=np.int64)
        """Columns in use, those that were dropped included."""
        self.dropped = np.zeros(rows, dtype=np.int64)
        self.reserved = np.zeros(rows, dtype=np.int64)
        self.computed = np.zeros(rows, dtype=np.int64)
        self.committed = np.zeros(rows, dtype=np.int64)
        self.generation = np.zeros(rows, dtype=np.int64)
        self.live = np.zeros(rows, dtype=np.bool_)
        self.tier = np.zeros(rows, dtype=np.uint8)
        self.last_step = np.full(rows, IDLE, dtype=np.int64)
        """Newest step in flight, ``IDLE``, or ``MOVING`` between tiers."""
        self.roots = np.zeros((rows, DIGEST_BYTES), dtype=np.uint8)
        """The name before each row's first block that was not dropped; before the first of all, its namespace."""
        self.window = np.repeat(np.array([window or 0 for window in windows], dtype=np.int64), max_sequences)
        """``windows`` by row, 0 for all tokens."""
        self.prompts: dict[int, Prompt] = {}
        self._tier_names = tier_names
        self._free = list(range(max_sequences - 1, -1, -1))

    @property
    def num_live(self) -> int:
        """Sequences there are."""
        return self.max_sequences - len(self._free)

    def require(self, count: int) -> None:
        """Raise ``OutOfSequences`` unless ``count`` sequences fit."""
        if count > len(self._free):
            raise OutOfSequences(count, len(self._free), self.max_sequences)

    def next_rows(self, n: int) -> list[int]:
        """The rows in group 0 that the next ``n`` sequences get."""
        return self._free[: -n - 1 : -1]

    def occupy(self, n: int) -> None:
        """These are no longer free."""
        del self._free[-n:]

    def groups_of(self, rows: Ints) -> Ints:
        """All rows of the sequences with these rows in group 0, group by group; -1 for what is no such row."""
        if len(self.windows) == 1:
            return rows
        known = (rows >= 0) & (rows < self.max_sequences)
        every = rows + self.max_sequences * np.arange(len(self.windows), dtype=np.int64)[:, None]
        return np.where(known, every, -1).reshape(-1)

    def spread(self, values: npt.NDArray[_Int]) -> npt.NDArray[_Int]:
        """What holds for each sequence of a batch, or for each of its tokens, once for each group."""
        return values if len(self.windows) == 1 else np.tile(values, len(self.windows))

    def create(self, root: bytes) -> Ints:
        """The empty rows of a new sequence of the first tier, one for each group."""
        rows = self.groups_of(np.array([self._free.pop()], dtype=np.int64))
        self.live[rows] = True
        self.tier[rows] = 0
        self.roots[rows] = [np.frombuffer(name, dtype=np.uint8) for name in group_roots(root, len(rows))]
        return rows

    def clone(self, row: int, n: int) -> list[int]:
        """``n`` new sequences with the same content, by their rows in group 0. The caller adds the references."""
        first = self.next_rows(n)
        self.occupy(n)
        parents = self.groups_of(np.array([row], dtype=np.int64))
        children = self.groups_of(np.array(first, dtype=np.int64)).reshape(len(parents), n)
        used = self.num_blocks[row]
        self.blocks[children, :used] = self.blocks[parents, None, :used]
        self.live[children] = True
        for column in (self.num_blocks, self.dropped, self.reserved, self.computed, self.committed, self.tier):
            column[children] = column[parents, None]
        self.roots[children] = self.roots[parents, None]
        if self.prompts:
            for parent, copies in zip(parents.tolist(), children.tolist(), strict=True):
                if parent in self.prompts:
                    self.prompts.update(dict.fromkeys(copies, self.prompts[parent]))
        return first

    def destroy(self, rows: Ints) -> None:
        """Empty these rows; their handles become stale."""
        for column in (self.num_blocks, self.dropped, self.reserved, self.computed, self.committed):
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
            if row < self.max_sequences:
                self._free.append(row)

    def handle(self, row: int, num_cached_tokens: int = 0) -> Sequence:
        """The handle of a live row."""
        return Sequence(row, int(self.generation[row]), num_cached_tokens)

    def rows(self, sequences: Iterable[Sequence] | Batch) -> Ints:
        """Rows of these handles, group by group. Raises ``StaleSequence``, ``InvalidInput`` if one is named twice."""
        batch = sequences if isinstance(sequences, Batch) else Batch(sequences)
        rows = batch.rows
        known = (rows >= 0) & (rows < self.max_sequences)
        here = np.where(known, rows, 0)
        stale = ~known | ~self.live[here] | (self.generation[here] != batch.generations)
        if stale.any():
            handle = batch.sequences[int(np.flatnonzero(stale)[0])]
            raise StaleSequence(handle.row, handle.generation)
        return self.groups_of(rows)

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

    def require_lengths(self, rows: Ints, lengths: Ints, block_size: int) -> None:
        """Raise ``InvalidInput`` unless these rows can be cut back to these lengths and go on from there."""
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            if not 0 <= length <= self.computed[row]:
                raise InvalidInput(f"length {length} is not in [0, {self.computed[row]}], what is computed")
            if self.dropped[row]:
                least = int(self.dropped[row]) * block_size + int(self.window[row]) - 1
                if length < least:
                    raise InvalidInput(
                        f"length {length} is less than {least}: a group whose layers see {self.window[row]} tokens "
                        "has given back the blocks before that"
                    )

    def held(self, row: int) -> Blocks:
        """The blocks of a row, a view."""
        return self.blocks[row, self.dropped[row] : self.num_blocks[row]]

    def cut(self, rows: Ints, keep: Ints) -> None:
        """Forget the columns from ``keep`` on. The caller has given back their blocks."""
        for row, kept in zip(rows.tolist(), keep.tolist(), strict=True):
            self.blocks[row, kept : self.num_blocks[row]] = NULL_BLOCK
        self.num_blocks[rows] = keep

    def leaf_first(self, rows: Ints, keep: Ints) -> tuple[Blocks, Ints | int]:
        """Distinct blocks of these rows, children before parents, and how often each is named.

        Each row's first ``keep`` blocks are left alone.
        """
        kept = np.maximum(keep, self.dropped[rows]).tolist()
        tails = [self.blocks[row, k : self.num_blocks[row]][::-1] for row, k in zip(rows.tolist(), kept, strict=True)]
        return (tails[0].copy(), 1) if len(tails) == 1 else tally(np.concatenate([*tails, np.zeros(0, dtype=np.int32)]))

    def references(self, tier: int, num_blocks: int) -> Ints:
        """int64 ``[num_blocks]``: table entries of this tier that name each block."""
        rows = np.flatnonzero(self.live & (self.tier == tier))
        columns = np.arange(self.blocks.shape[1])
        named = (columns >= self.dropped[rows, None]) & (columns < self.num_blocks[rows, None])
        return np.bincount(self.blocks[rows][named], minlength=num_blocks).astype(np.int64)
