"""Which sequences would have to go so that others fit, and what that costs. The engine decides; nothing changes here.

A block comes free only when everybody who holds it has gone, so sharers count together. To swap a sequence out costs
copying its blocks to the host, and back later; to drop it costs running its tokens again, but for those that stay
cached. Each victim is swapped while the host has room for it, and dropped after that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .eviction import Blocks
from .pool import BlockState
from .sequences import IDLE, Sequence, SequenceTable
from .tier import Tier


@dataclass(frozen=True, slots=True)
class Preemption:
    """What would make room. ``missing`` is what still would not fit if all of it were done, in blocks."""

    swap_out: tuple[Sequence, ...]
    drop: tuple[Sequence, ...]
    """To free, and to run again later."""
    blocks: int
    """Blocks of the device that come free."""
    swapped_blocks: int
    """Blocks to copy to the host."""
    dropped_tokens: int
    """Computed tokens of those to drop: at most as many have to be run again."""
    missing: int


def plan_preemption(
    shortage: int, candidates: list[Sequence], device: Tier, host: Tier | None, table: SequenceTable
) -> Preemption:
    """Take ``candidates`` in the order given until ``shortage`` blocks would come free; busy ones are passed over."""
    owned: dict[int, int] = {}
    gained = 0
    victims: list[tuple[Sequence, Blocks]] = []
    for sequence in candidates:
        if gained >= shortage:
            break
        rows = table.rows([sequence])
        if (table.last_step[rows] == IDLE).all() and (table.tier[rows] == 0).all():
            victims.append((sequence, np.concatenate([table.held(row) for row in rows.tolist()])))
            gained += _freed(victims[-1][1], owned, device)
    useful = [one for one in victims if any(owned[block] == device.pool.refs[block] for block in one[1].tolist())]
    room = host.pool.available if host is not None else 0
    swap, drop = list[Sequence](), list[Sequence]()
    brought, kept = set[int](), set[int]()
    for sequence, blocks in useful:
        new, there = _in_host(blocks, device, host)
        if host is not None and len(brought | new) + len(kept | there) <= room:
            brought, kept = brought | new, kept | there
            swap.append(sequence)
        else:
            drop.append(sequence)
    tokens = sum(int(table.computed[sequence.row]) for sequence in drop)
    return Preemption(tuple(swap), tuple(drop), gained, len(brought), tokens, max(shortage - gained, 0))


def _freed(blocks: Blocks, owned: dict[int, int], device: Tier) -> int:
    """Blocks that come free with this victim, those before it in ``owned`` counted in."""
    freed = 0
    for block in blocks.tolist():
        owned[block] = owned.get(block, 0) + 1
        freed += owned[block] == int(device.pool.refs[block])
    return freed


def _in_host(blocks: Blocks, device: Tier, host: Tier | None) -> tuple[set[int], set[int]]:
    """Blocks of these that have to be copied, and the host's own that can no longer be evicted for them."""
    if host is None:
        return set(), set()
    published = blocks[device.pool.published[blocks]]
    there = host.index.find(device.index.names_of(published))
    found = there >= 0
    cached = there[found][host.pool.state[there[found]] == BlockState.cached]
    return set(blocks.tolist()) - set(published[found].tolist()), set(cached.tolist())
