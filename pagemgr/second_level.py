"""The host tier as a second-level cache: what the device evicts goes down, what a prompt finds there comes up.

    eviction ─► plan (pure) ─► begin ─► (copy) ─► settle, or drop          part of what evicts
    prompt   ─► promote ─► (copy) ─► finish, or cancel                     a Promotion

Going down never fails and never evicts on behalf of sequences: what finds no room is lost, the least wanted first.
Inclusive, a block that came up stays below as well, so that it need not be copied when it is evicted again; exclusive,
it is given up below, so that the two tiers hold more between them.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .admission import Arrival, Match, admit, blocks_below
from .eviction import Blocks
from .layout import NULL_BLOCK
from .plan import Copies, Demotion, Ints, Promotion
from .pool import Fence
from .sequences import IDLE, MOVING, Sequence, SequenceTable
from .swapping import publish_moved
from .tier import Tier


class SecondLevel:
    """The rules between the device tier and a host tier that caches for it."""

    def __init__(self, device: Tier, host: Tier, exclusive: bool) -> None:
        self.device, self.host, self.exclusive = device, host, exclusive

    # Down -----------------------------------------------------------------------------------------------------------

    def plan(self, fresh: Blocks) -> Demotion | None:
        """Where that goes which is evicted for these blocks of the device, unless it is here already. Pure."""
        evicted = fresh[self.device.pool.published[fresh]]
        if not len(evicted):
            return None
        missing = evicted[self.host.index.find(self.device.index.names_of(evicted)) < 0]
        going = missing[max(len(missing) - self.host.pool.available, 0) :]
        if not len(going):
            return None
        return Demotion(going, self.host.pool.peek(len(going)), self.device.index.names_of(going))

    def demote(self, fresh: Blocks) -> Demotion | None:
        """``plan`` and ``begin``."""
        demotion = self.plan(fresh)
        if demotion is not None:
            self.begin(demotion)
        return demotion

    def begin(self, demotion: Demotion) -> None:
        """Own the blocks here, before the device's are taken."""
        self.host.take(demotion.blocks)
        self.host.index.describe(demotion.blocks, self.device.index, demotion.evicted)

    def settle(self, demotion: Demotion) -> None:
        """The bytes are here: they can be found."""
        roots = np.full_like(demotion.blocks, NULL_BLOCK)
        groups = self.host.index.groups[demotion.blocks]
        self.host.publish(demotion.blocks, demotion.names, roots, groups, (self.device.name, "demoted"))
        self.host.pool.release(demotion.blocks)

    def drop(self, demotion: Demotion) -> None:
        """The bytes may not be here."""
        self.host.pool.release(demotion.blocks[::-1])

    # Up -------------------------------------------------------------------------------------------------------------

    def promote(
        self, matches: list[Match], arrivals: list[Arrival], table: SequenceTable, keep_prompts: bool
    ) -> tuple[list[Sequence], Promotion]:
        """Make sequences out of what both tiers hold; they can be used once the promotion is finished.

        Raises ``OutOfBlocks`` of the device and changes nothing.
        """
        distinct = blocks_below(matches)
        counts = Counter(block for match in matches for blocks in match.below for block in blocks.tolist())
        mentions = np.array([counts[block] for block in distinct.tolist()], dtype=np.int64)
        here = np.concatenate([blocks for match in matches for blocks in match.blocks])
        fresh = self.device.pool.peek(len(distinct), sparing=np.unique(here[here >= 0]))

        self.host.share(distinct)
        for match in matches:
            for blocks in match.blocks:
                self.device.share(blocks[blocks >= 0])
        demotion = self.demote(fresh)
        self.device.take(fresh)
        self.device.share(fresh, mentions - 1)
        self.device.index.describe(fresh, self.host.index, distinct)
        arrived = dict(zip(distinct.tolist(), fresh.tolist(), strict=True))
        whole = [match.arrived(arrived) for match in matches]
        sequences = [
            admit(match, arrival, self.device, table, keep_prompts, shared=True)
            for match, arrival in zip(whole, arrivals, strict=True)
        ]
        rows = table.rows(sequences)
        table.last_step[rows] = MOVING
        pairs = np.stack([distinct, fresh], axis=1)
        up = Copies(self.host.name, self.device.name, pairs)
        down = () if demotion is None else (demotion.copies(self.device.name, self.host.name),)
        names = self.host.index.names_of(distinct)
        return sequences, Promotion(rows, (*down, up), distinct, fresh, names, demotion)

    def finish(self, promotion: Promotion, table: SequenceTable, fences: tuple[Fence, ...]) -> None:
        """The bytes are on the device: publish them there."""
        table.last_step[promotion.rows] = IDLE
        origin = (self.host.name, "promoted")
        publish_moved(promotion.rows, promotion.fresh, promotion.names, origin, self.device, table, fences)
        self.give_up(promotion.blocks, 1)
        self.host.pool.release(promotion.blocks, 1, fences)

    def cancel(self, promotion: Promotion, table: SequenceTable) -> None:
        """The copy failed: the sequences end."""
        self.device.pool.release(*table.leaf_first(promotion.rows, np.zeros_like(promotion.rows)))
        table.destroy(promotion.rows)
        self.host.pool.release(promotion.blocks)

    def give_up(self, blocks: Blocks, times: Ints | int) -> None:
        """The device has what these blocks hold, and ``times`` references to each are about to be released.

        If the cache is exclusive, those that nobody else holds lose it.
        """
        if self.exclusive:
            alone = (self.host.pool.refs[blocks] == times) & self.host.pool.published[blocks]
            self.host.retract(blocks[alone], "moved")
