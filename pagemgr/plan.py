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
class Demotion:
    """Blocks of the device that are evicted, and the blocks of the host that take over what they hold."""

    evicted: Blocks
    blocks: Blocks
    names: bytes

    def copies(self, source: str, target: str) -> Copies:
        """To execute before anything is written to the evicted blocks."""
        return Copies(source, target, np.stack([self.evicted, self.blocks], axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: what was reserved for a batch of sequences. Execute ``copies`` before anything is written.

    Sequence ``i`` of the batch has ``counts[i]`` new tokens, which follow its first ``starts[i]`` tokens. Where layers
    form several groups, every array holds the batch once for each group, one after the other.
    """

    step: int
    """Number of the step; steps commit in this order."""
    num_groups: int
    """Layer groups; ``num_rows`` below is ``num_groups * num_seqs``."""
    rows: Ints
    """Rows in the block table, ``[num_rows]``."""
    generations: Ints
    previous: Ints
    """Per row, the step in flight that this one builds on."""
    starts: Ints
    counts: Ints
    tokens: npt.NDArray[np.int32]
    """The new token ids, ``[num_groups * num_tokens]``; negative where they come at commit."""
    block_table: npt.NDArray[np.int32]
    """``[num_rows, width]``, as wide as the longest sequence of the batch; padded with the null block."""
    query_start: npt.NDArray[np.int32]
    """``[num_rows + 1]``, cumulative counts."""
    slot_mapping: Ints
    """``[num_groups * num_tokens]``, where each new token's K and V go."""
    copies: tuple[Copies, ...]
    """What goes down to the host before it is overwritten, then copy-on-write: tails that others still read."""
    replaced: tuple[Ints, Blocks, Blocks]
    """Tails that copy-on-write replaced: positions in the batch, new blocks, old blocks."""
    demotion: Demotion | None

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.rows) // self.num_groups

    @property
    def num_tokens(self) -> int:
        """New tokens of the whole batch."""
        return len(self.slot_mapping) // self.num_groups

    @property
    def seq_lens(self) -> npt.NDArray[np.int32]:
        """int32 ``[num_seqs]``: lengths once the step has run."""
        n = self.num_seqs
        return (self.starts[:n] + self.counts[:n]).astype(np.int32)


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
    demotion: Demotion | None

    @property
    def num_copied(self) -> int:
        """Blocks whose bytes have to move from source to target."""
        return sum(len(copies.pairs) for copies in self.copies if copies.source == self.source)


@dataclass(frozen=True, slots=True, eq=False)
class Promotion:
    """New sequences whose prompts are partly in the host tier: to be finished or cancelled once that was copied."""

    rows: Ints
    copies: tuple[Copies, ...]
    blocks: Blocks
    """Of the host, held until the end."""
    fresh: Blocks
    """Of the device, which take over what those hold, under the same names."""
    names: bytes
    demotion: Demotion | None

    @property
    def num_copied(self) -> int:
        """Blocks whose bytes have to come up."""
        return len(self.blocks)
