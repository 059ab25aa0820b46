"""What a dump comes to: the map of its blocks, who holds most, and what is shared. Pure functions, numpy alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from pagemgr.dump import Dump, SequenceDump, TierDump
from pagemgr.eviction import Blocks
from pagemgr.pool import BlockState
from pagemgr.sequences import IDLE, MOVING
from pagemgr.stats import TierStats

TIGHT = 0.05
"""Share of a tier that can still be given out, below which it is called tight."""


def block_map(tier: TierDump, most_cells: int) -> dict[str, Any]:
    """The tier in at most ``most_cells`` cells of equally many consecutive blocks (the last may have fewer).

    ``counts[s]`` holds, for state ``s`` of ``states``, the blocks in that state cell by cell, and ``references`` the
    most references that one block of the cell has.
    """
    size = len(tier.state)
    per_cell = -(-size // most_cells)
    starts = np.arange(0, size, per_cell)
    cells = np.zeros(len(starts) * per_cell, dtype=np.uint8)
    cells[:size] = tier.state
    cells[size:] = len(BlockState)  # a state that nobody has fills the last cell
    rows = cells.reshape(len(starts), per_cell)
    return {
        "tier": tier.name,
        "blocks": size,
        "blocks_per_cell": per_cell,
        "states": [state.name for state in BlockState],
        "counts": [(rows == state).sum(axis=1).tolist() for state in BlockState],
        "references": np.maximum.reduceat(tier.refs, starts).tolist(),
    }


def largest_sequences(dump: Dump, limit: int) -> list[dict[str, Any]]:
    """The sequences with most blocks, largest first, older rows first among equals."""
    refs = {tier.name: tier.refs for tier in dump.tiers}
    held = _by_sequence(dump)
    chosen = sorted(_first_group(dump), key=lambda one: (-len(held[one.row]), one.row))[:limit]
    return [
        {
            "row": one.row,
            "generation": one.generation,
            "tier": one.tier,
            "doing": _doing(one),
            "tokens": one.computed,
            "blocks": len(held[one.row]),
            "shared_blocks": int((refs[one.tier][held[one.row]] > 1).sum()),
            "bytes": len(held[one.row]) * dump.block_bytes,
        }
        for one in chosen
    ]


def shared_prefixes(dump: Dump, limit: int) -> list[dict[str, Any]]:
    """Families of sequences that start with the same block: how far all of them agree, and what sharing saves.

    The block is that of group 0, whose layers see most; what is saved is that of all groups.

    The families that save most come first. A prefix is known by the block it begins with; what it says stays unknown.
    """
    families: defaultdict[tuple[str, int], list[SequenceDump]] = defaultdict(list)
    for one in _first_group(dump):
        if len(one.blocks) and not one.dropped:
            families[one.tier, int(one.blocks[0])].append(one)
    blocks = _by_sequence(dump)
    held = {tier.name: np.zeros(len(tier.state), dtype=np.bool_) for tier in dump.tiers}
    found: list[dict[str, Any]] = []
    for (tier, first), members in families.items():
        if len(members) == 1:
            continue
        entries = np.concatenate([blocks[one.row] for one in members])
        held[tier][entries] = True
        saved = len(entries) - int(np.count_nonzero(held[tier]))
        held[tier][entries] = False
        common = _common_blocks(members)
        found.append(
            {
                "tier": tier,
                "first_block": first,
                "sequences": len(members),
                "common_tokens": min(common * dump.block_size, *(one.computed for one in members)),
                "saved_blocks": saved,
                "saved_bytes": saved * dump.block_bytes,
            }
        )
    return sorted(found, key=lambda family: (-family["saved_blocks"], family["first_block"]))[:limit]


def health(tier: TierStats) -> str:
    """One word on a tier: ``idle`` (empty), ``ok``, ``tight`` or ``full``."""
    usable, available = tier.num_blocks - tier.null, tier.free + tier.cached
    if available == usable and not tier.cached:
        return "idle"
    return "full" if available == 0 else "tight" if available < TIGHT * usable else "ok"


def num_sequences(dump: Dump) -> int:
    """Live sequences."""
    return len(_first_group(dump))


def _first_group(dump: Dump) -> list[SequenceDump]:
    return [one for one in dump.sequences if one.group == 0]


def _by_sequence(dump: Dump) -> dict[int, Blocks]:
    """The blocks of each sequence in all groups, by its row."""
    parts: defaultdict[int, list[Blocks]] = defaultdict(list)
    for one in dump.sequences:
        parts[one.row].append(one.blocks)
    return {row: np.concatenate(blocks) for row, blocks in parts.items()}


def _doing(one: SequenceDump) -> str:
    return {IDLE: "idle", MOVING: "moving"}.get(one.last_step, "in a step")


def _common_blocks(members: list[SequenceDump]) -> int:
    """Blocks from the beginning on which all of these agree."""
    depth = min(len(one.blocks) for one in members)
    same = np.ones(depth, dtype=np.bool_)
    for one in members[1:]:
        same &= one.blocks[:depth] == members[0].blocks[:depth]
    return depth if same.all() else int(np.argmin(same))
