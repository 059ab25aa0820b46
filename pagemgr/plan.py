"""What the manager decided, as frozen data: numpy only. ``storage`` moves the bytes, ``batch`` makes the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .eviction import Blocks

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Copies:
    """Whole blocks to copy. ``pairs`` int32 ``[n, 2]``: from a block of ``source`` to a block of ``target``."""

    source: str
    target: str
    pairs: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: what was reserved for a batch of sequences. Execute ``copies`` before anything is written.

    Sequence ``i`` of the batch has ``counts[i]`` new tokens, which follow its first ``starts[i]`` tokens.
    """

    step: int
    """Number of the step; steps commit in this order."""
    rows: Ints
    """Rows in the block table, ``[num_seqs]``."""
    generations: Ints
    previous: Ints
    """Per row, the step in flight that this one builds on."""
    starts: Ints
    counts: Ints
    tokens: npt.NDArray[np.int32]
    """The new token ids, ``[num_tokens]``; negative where they come at commit."""
    block_table: npt.NDArray[np.int32]
    """``[num_seqs, width]``, as wide as the longest sequence of the batch; padded with the null block."""
    query_start: npt.NDArray[np.int32]
    """``[num_seqs + 1]``, cumulative counts."""
    slot_mapping: Ints
    """``[num_tokens]``, where each new token's K and V go."""
    copies: tuple[Copies, ...]
    """Copy-on-write: tails that others still read."""
    replaced: tuple[Ints, Blocks, Blocks]
    """Tails that copy-on-write replaced: positions in the batch, new blocks, old blocks."""

    @property
    def num_tokens(self) -> int:
        """New tokens of the whole batch."""
        return len(self.slot_mapping)

    @property
    def seq_lens(self) -> npt.NDArray[np.int32]:
        """int32 ``[num_seqs]``: lengths once the step has run."""
        return (self.starts + self.counts).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A move of whole sequences between tiers: begun, and to be finished or cancelled once the bytes were copied."""

    source: str
    target: str
    rows: Ints
    copies: tuple[Copies, ...]
    """Only blocks whose bytes have to move: those that the target tier already holds do not."""
    moved: tuple[Blocks, ...]
    """Per row, the blocks of the target tier that it will consist of, in token order."""
    names: tuple[Blocks, bytes]
    """Blocks of the target tier to publish, and their names."""

    @property
    def num_copied(self) -> int:
        """Blocks whose bytes have to move."""
        return sum(len(copies.pairs) for copies in self.copies)
