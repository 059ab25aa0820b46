"""Reading the manager's state: the snapshot for metrics, and every invariant that spans more than one part."""

from __future__ import annotations

from copy import deepcopy

import numpy as np

from .errors import InternalError
from .layout import NULL_BLOCK
from .plan import Ints, Transfer
from .pool import BlockState
from .prefix import hash_blocks
from .sequences import IDLE, SequenceTable
from .stats import Counters, Stats, TierStats
from .steps import ramp
from .swapping import owned_in_target
from .tier import Tier


def snapshot(
    tiers: tuple[Tier, ...], table: SequenceTable, moving: list[Transfer], counters: Counters, in_flight: int
) -> Stats:
    """Everything that ``Stats`` holds, in time that grows with the sequences and not with the pool."""
    return Stats(
        tiers=tuple(_tier_stats(i, tier, table, moving) for i, tier in enumerate(tiers)),
        counters=deepcopy(counters),
        sequences=table.num_live,
        max_sequences=len(table.live),
        steps_in_flight=in_flight,
        digest="-".join(f"{tier.digest:08x}" for tier in tiers),
    )


def _tier_stats(number: int, tier: Tier, table: SequenceTable, moving: list[Transfer]) -> TierStats:
    pool = tier.pool
    rows = np.flatnonzero(table.live & (table.tier == number))
    return TierStats(
        name=tier.name,
        num_blocks=pool.num_blocks,
        block_size=tier.index.block_size,
        **{state.name: pool.counts[state] for state in BlockState},
        references=int(table.num_blocks[rows].sum()) + len(owned_in_target(moving, tier)),
        waste_slots=_waste(rows, tier, table, moving),
        allocated_total=pool.num_allocated,
        released_total=pool.num_released,
        evicted_total=pool.num_evicted,
        sequences=len(rows),
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


def check(tiers: tuple[Tier, ...], table: SequenceTable, moving: list[Transfer], named: bool) -> None:
    """Raise ``InternalError`` at the first invariant that does not hold."""
    for number, tier in enumerate(tiers):
        held = np.bincount(owned_in_target(moving, tier), minlength=tier.pool.num_blocks)
        tier.check(table.references(number, tier.pool.num_blocks) + held)
    _check_rows(tiers[0].index.block_size, table)
    if named:
        for row in np.flatnonzero(table.live).tolist():
            _check_names(row, tiers[table.tier[row]], table)


def _check_rows(size: int, table: SequenceTable) -> None:
    live = table.live
    columns = np.arange(table.blocks.shape[1])
    inside = columns[None, :] < table.num_blocks[:, None]
    laws = (
        ("committed ≤ computed ≤ reserved", (table.committed <= table.computed) & (table.computed <= table.reserved)),
        ("a row has the blocks its reserved tokens need", table.num_blocks == -(-table.reserved // size)),
        ("only live rows have tokens", live | (table.reserved == 0)),
        ("idle rows have computed all they reserved", (table.last_step != IDLE) | (table.computed == table.reserved)),
        ("blocks exactly within a row's length", ((table.blocks != NULL_BLOCK) == inside).all(axis=1)),
    )
    for law, holds in laws:
        if not holds.all():
            raise InternalError(f"row {int(np.flatnonzero(~holds)[0])}: broken invariant: {law}")
    if int(live.sum()) != table.num_live:
        raise InternalError(f"{int(live.sum())} live rows, {table.num_live} counted")


def _check_names(row: int, tier: Tier, table: SequenceTable) -> None:
    """Every full committed block is published, under the hash of what it holds."""
    full = int(table.committed[row]) // tier.index.block_size
    blocks = table.blocks[row, :full]
    if not tier.pool.published[blocks].all():
        raise InternalError(f"row {row}: a full committed block is not published")
    tokens = tier.index.tokens[blocks].reshape(-1)
    if hash_blocks(table.roots[row].tobytes(), tokens, tier.index.block_size) != tier.index.names_of(blocks):
        raise InternalError(f"row {row}: a block's name is not the hash of what it holds")
