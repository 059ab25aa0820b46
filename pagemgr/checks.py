"""Reading the manager's state: the snapshot for metrics, and every invariant that spans more than one part."""

from __future__ import annotations

from copy import deepcopy

import numpy as np

from .errors import InternalError
from .layout import NULL_BLOCK
from .plan import Transfer
from .pool import BlockState
from .prefix import hash_blocks
from .sequences import IDLE, SequenceTable
from .stats import Counters, Stats, TierStats
from .swapping import owned_in_target
from .tier import Tier


def snapshot(tiers: tuple[Tier, ...], table: SequenceTable, counters: Counters, in_flight: int) -> Stats:
    """Everything that ``Stats`` holds, in O(sequences)."""
    return Stats(
        tiers=tuple(_tier_stats(i, tier, table) for i, tier in enumerate(tiers)),
        counters=deepcopy(counters),
        sequences=table.num_live,
        max_sequences=len(table.live),
        steps_in_flight=in_flight,
        digest="-".join(f"{tier.digest:08x}" for tier in tiers),
    )


def _tier_stats(number: int, tier: Tier, table: SequenceTable) -> TierStats:
    pool = tier.pool
    rows = np.flatnonzero(table.live & (table.tier == number))
    return TierStats(
        name=tier.name,
        num_blocks=pool.num_blocks,
        block_size=tier.index.block_size,
        **{state.name: pool.counts[state] for state in BlockState},
        references=int(table.num_blocks[rows].sum()),
        waste_slots=_waste(rows, tier, table),
        allocated_total=pool.num_allocated,
        released_total=pool.num_released,
        evicted_total=pool.num_evicted,
        sequences=len(rows),
    )


def _waste(rows: np.ndarray[tuple[int], np.dtype[np.int64]], tier: Tier, table: SequenceTable) -> int:
    """Slots of open blocks that hold no token: of a block that several share, what its longest owner leaves."""
    size = tier.index.block_size
    left: dict[int, int] = {}
    for row in rows.tolist():
        computed = int(table.computed[row])
        for column in range(computed // size, int(table.num_blocks[row])):
            block = int(table.blocks[row, column])
            empty = size - min(max(computed - column * size, 0), size)
            left[block] = min(left.get(block, size), empty)
    return sum(empty for block, empty in left.items() if tier.pool.state[block] == BlockState.open)


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
    names = hash_blocks(table.roots[row], tier.index.tokens[blocks].reshape(-1), tier.index.block_size)
    if names != [tier.index.name(block) for block in blocks.tolist()]:
        raise InternalError(f"row {row}: a block's name is not the hash of what it holds")
