"""Moving whole sequences between two tiers, in either direction: begun, then finished or cancelled.

While a transfer is under way its rows keep their blocks in the source tier and already own blocks in the target tier,
so that neither a failure nor another caller can lose either side. A block that several rows share is copied once and
shared again in the target; one whose name the target holds is not copied at all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from .errors import InternalError
from .eviction import Blocks
from .layout import NULL_BLOCK
from .plan import Copies, Demotion, Ints, Transfer
from .pool import Fence, tally
from .sequences import IDLE, MOVING, SequenceTable
from .tier import Tier

Demote = Callable[[Blocks], Demotion | None]
"""Says what becomes of the content that is evicted for these blocks."""


def begin(rows: Ints, source: Tier, target: Tier, table: SequenceTable, demote: Demote) -> Transfer:
    """Own blocks of the target tier for all of ``rows``, or raise ``OutOfBlocks`` and change nothing."""
    old = [table.held(row) for row in rows.tolist()]
    entries = np.concatenate([*old, np.zeros(0, dtype=np.int32)])
    distinct, first, inverse, mentions = np.unique(entries, return_index=True, return_inverse=True, return_counts=True)
    published = source.pool.published[distinct]
    known = np.full(len(distinct), -1, dtype=np.int32)
    known[published] = target.index.find(source.index.names_of(distinct[published]))
    there = known >= 0
    held = known[there]
    # Copy in the order of the rows, so that a sequence's blocks stay together in the target.
    missing = np.flatnonzero(~there)[np.argsort(first[~there])]

    fresh = target.pool.peek(len(missing), sparing=held)
    new = np.empty(len(distinct), dtype=np.int32)
    new[there], new[missing] = held, fresh
    demotion = demote(fresh)
    target.take(fresh)
    target.share(new, np.where(there, mentions, mentions - 1))
    table.last_step[rows] = MOVING

    down = () if demotion is None else (demotion.copies(target.name, source.name),)
    pairs = np.stack([distinct[missing], fresh], axis=1)
    named = published[missing]
    ends = np.cumsum([len(blocks) for blocks in old])
    return Transfer(
        source=source.name,
        target=target.name,
        rows=rows,
        copies=(*down, Copies(source.name, target.name, pairs)) if len(pairs) else (),
        moved=tuple(np.split(new[inverse], ends[:-1])) if len(rows) else (),
        names=(fresh[named], source.index.names_of(distinct[missing][named])),
        demotion=demotion,
    )


GiveUp = Callable[[Blocks, Ints | int], None]
"""Is told which blocks, and how often each, will be released because the other tier has what they hold."""


def finish(
    transfer: Transfer, tiers: tuple[Tier, ...], table: SequenceTable, fences: tuple[Fence, ...], give_up: GiveUp
) -> None:
    """Point the rows at the target tier and give back the source's blocks once ``fences`` have passed."""
    source, target = (tier_named(tiers, name) for name in (transfer.source, transfer.target))
    leaving = table.leaf_first(transfer.rows, np.zeros_like(transfer.rows))
    for copies in [copies for copies in transfer.copies if copies.source == source.name]:
        target.index.describe(copies.pairs[:, 1], source.index, copies.pairs[:, 0])
    for row, blocks in zip(transfer.rows.tolist(), transfer.moved, strict=True):
        table.held(row)[:] = blocks
    table.tier[transfer.rows] = tiers.index(target)
    table.last_step[transfer.rows] = IDLE
    give_up(*leaving)
    source.pool.release(*leaving, fences)
    publish_moved(transfer.rows, *transfer.names, (source.name, "swapped"), target, table, fences)


def publish_moved(
    rows: Ints,
    blocks: Blocks,
    names: bytes,
    origin: tuple[str, str],
    tier: Tier,
    table: SequenceTable,
    fences: tuple[Fence, ...],
) -> None:
    """What these rows hold has come to this tier: publish the blocks that had names where they came from."""
    # In the host blocks stand alone: one may leave while those that follow it stay.
    chained = [row for row in rows.tolist() if not table.window[row]] if tier.name == "device" else []
    whole = [table.held(row).tolist() for row in chained]
    before = {b: a for held in whole for a, b in pairwise(held)}
    parents = np.array([before.get(block, NULL_BLOCK) for block in blocks.tolist()], dtype=np.int32)
    kept = tier.publish(blocks, names, parents, tier.index.groups[blocks], origin)
    for block, other in zip(blocks.tolist(), kept.tolist(), strict=True):
        if other != block:
            _replace(tier, table, rows, block, other, fences)
    for row in rows.tolist():
        held = table.held(row)
        named = held[: int(np.count_nonzero(tier.pool.published[held]))]
        if len(named):
            tier.index.lead(named, table.roots[row].tobytes() + tier.index.names_of(named[:-1]))


def cancel(transfer: Transfer, tiers: tuple[Tier, ...], table: SequenceTable) -> None:
    """Give back the target's blocks; the rows never left."""
    owned = [blocks[::-1] for blocks in transfer.moved]
    tier_named(tiers, transfer.target).pool.release(*tally(np.concatenate([*owned, np.zeros(0, dtype=np.int32)])))
    table.last_step[transfer.rows] = IDLE


def tier_named(tiers: tuple[Tier, ...], name: str) -> Tier:
    """The tier called ``name``."""
    for tier in tiers:
        if tier.name == name:
            return tier
    raise InternalError(f"no tier {name!r}")


def _replace(tier: Tier, table: SequenceTable, rows: Ints, old: int, new: int, fences: tuple[Fence, ...]) -> None:
    """Somebody published the same prefix while the bytes moved: share theirs."""
    mine, columns = np.nonzero(table.blocks[rows] == old)
    tier.share(np.array([new], dtype=np.int32), len(mine))
    table.blocks[rows[mine], columns] = new
    tier.pool.release(np.array([old], dtype=np.int32), len(mine), fences)
