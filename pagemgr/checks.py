"""Reading the manager's state: the snapshot for metrics, and every invariant that spans more than one part."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import numpy as np

from .errors import InternalError
from .eviction import Blocks
from .layout import NULL_BLOCK
from .pins import Pins
from .plan import Ints, Transfer
from .pool import BlockState
from .prefix import hash_blocks
from .sequences import IDLE, SequenceTable
from .stats import Counters, Stats, TierStats
from .steps import ramp
from .tier import Tier

_NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int32)


Held = Mapping[str, Blocks]
"""By tier: blocks that others than rows hold, once for each reference."""


def snapshot(
    tiers: tuple[Tier, ...],
    table: SequenceTable,
    moving: list[Transfer],
    held: Held,
    pins: Pins,
    counters: Counters,
    in_flight: int,
) -> Stats:
    """Everything that ``Stats`` holds, in time that grows with the sequences and not with the pool."""
    return Stats(
        tiers=tuple(_tier_stats(i, tier, table, moving, held[tier.name], pins) for i, tier in enumerate(tiers)),
        counters=deepcopy(counters),
        sequences=table.num_live,
        max_sequences=table.max_sequences,
        steps_in_flight=in_flight,
        digest="-".join(f"{tier.digest:08x}" for tier in tiers),
    )


def _tier_stats(
    number: int, tier: Tier, table: SequenceTable, moving: list[Transfer], held: Blocks, pins: Pins
) -> TierStats:
    pool = tier.pool
    rows = np.flatnonzero(table.live & (table.tier == number))
    pinning = pins.blocks() if number == 0 else _NO_BLOCKS
    pinned, times = np.unique(pinning, return_counts=True)
    return TierStats(
        name=tier.name,
        num_blocks=pool.num_blocks,
        block_size=tier.index.block_size,
        **{state.name: pool.counts[state] for state in BlockState},
        references=int((table.num_blocks[rows] - table.dropped[rows]).sum()) + len(held) - len(pinning),
        pinned=int(np.count_nonzero(pool.refs[pinned] == times)),
        waste_slots=_waste(rows, tier, table, moving),
        allocated_total=pool.num_allocated,
        released_total=pool.num_released,
        evicted_total=pool.num_evicted,
        sequences=int((rows < table.max_sequences).sum()),
    )


def _waste(rows: Ints, tier: Tier, table: SequenceTable, moving: list[Transfer]) -> int:
    """Slots of open blocks that hold no token: of a block that several share, what its longest owner leaves.

    Only the columns that a row has not computed to the end are looked at. An owner that is not seen there has computed
    the whole block, so that it wastes nothing.
    """
    size = tier.index.block_size
    first = table.computed[rows] // size
    tails = table.num_blocks[rows] - first
    columns = np.repeat(first, tails) + ramp(tails)
    blocks = [table.blocks[np.repeat(rows, tails), columns]]
    filled = [np.clip(np.repeat(table.computed[rows], tails) - columns * size, 0, size)]
    for transfer in moving:
        if transfer.target == tier.name:
            for row, owned in zip(transfer.rows.tolist(), transfer.moved, strict=True):
                skipped = int(table.computed[row]) // size
                blocks.append(owned[skipped:])
                filled.append(table.computed[row] - size * np.arange(skipped, len(owned)))
    distinct, where, seen = np.unique(np.concatenate(blocks), return_inverse=True, return_counts=True)
    most = np.zeros(len(distinct), dtype=np.int64)
    np.maximum.at(most, where, np.concatenate(filled))
    wasteful = (tier.pool.state[distinct] == BlockState.open) & (tier.pool.refs[distinct] == seen)
    return int((size - most[wasteful]).sum())


def check(tiers: tuple[Tier, ...], table: SequenceTable, held: Held, unnamed: Ints) -> None:
    """Raise ``InternalError`` at the first invariant that does not hold. Names of ``unnamed`` rows are not checked."""
    for number, tier in enumerate(tiers):
        others = np.bincount(held[tier.name], minlength=tier.pool.num_blocks)
        tier.check(table.references(number, tier.pool.num_blocks) + others)
    _check_rows(tiers[0].index.block_size, table)
    for row in np.setdiff1d(np.flatnonzero(table.live), unnamed).tolist():
        _check_names(row, tiers[table.tier[row]], table)


def _check_rows(size: int, table: SequenceTable) -> None:
    live = table.live
    columns = np.arange(table.blocks.shape[1])
    inside = (columns >= table.dropped[:, None]) & (columns < table.num_blocks[:, None])
    laws = (
        ("committed ≤ computed ≤ reserved", (table.committed <= table.computed) & (table.computed <= table.reserved)),
        ("a row has the blocks its reserved tokens need", table.num_blocks == -(-table.reserved // size)),
        ("only live rows have tokens", live | (table.reserved == 0)),
        ("idle rows have computed all they reserved", (table.last_step != IDLE) | (table.computed == table.reserved)),
        ("only what left a window was dropped", table.dropped * size <= np.where(table.window, table.computed, 0)),
        ("blocks exactly within a row's length", ((table.blocks != NULL_BLOCK) == inside).all(axis=1)),
    )
    for law, holds in laws:
        if not holds.all():
            raise InternalError(f"row {int(np.flatnonzero(~holds)[0])}: broken invariant: {law}")
    by_group = live.reshape(-1, table.max_sequences)
    if int(by_group[0].sum()) != table.num_live or (by_group != by_group[0]).any():
        raise InternalError(f"{by_group.sum(axis=1).tolist()} live rows by group, {table.num_live} sequences counted")


def _check_names(row: int, tier: Tier, table: SequenceTable) -> None:
    """Every full committed block is published, under the hash of what it holds."""
    full = int(table.committed[row]) // tier.index.block_size
    blocks = table.blocks[row, table.dropped[row] : full]
    if not tier.pool.published[blocks].all():
        raise InternalError(f"row {row}: a full committed block is not published")
    tokens = tier.index.tokens[blocks].reshape(-1)
    if hash_blocks(table.roots[row].tobytes(), tokens, tier.index.block_size) != tier.index.names_of(blocks):
        raise InternalError(f"row {row}: a block's name is not the hash of what it holds")
