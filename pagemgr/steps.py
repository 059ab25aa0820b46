"""One step on the block table: planned without changing anything, then applied or undone.

Copy-on-write is decided here. A step writes into the tail block of a sequence in place only if nobody else can ever
read what it overwrites. So a tail is replaced by a copy if others share it, if it is published (after a truncate into
it), or if it waits for a fence: then somebody who let go of it may still be reading it, or may get it back by an abort.
One exception saves a copy: if all owners of a shared tail are in the batch, the longest keeps it, as it writes past
what the others hold; among equals, the last.
"""

from __future__ import annotations

import numpy as np

from .eviction import Blocks
from .plan import Copies, Ints, Plan
from .pool import BlockState, Fence
from .prefix import TokenArray, hash_blocks
from .sequences import SequenceTable
from .tier import Tier


def plan_step(
    step: int, tier: Tier, table: SequenceTable, rows: Ints, counts: Ints, tokens: tuple[TokenArray | None, ...]
) -> Plan:
    """Decide which blocks the batch gets. Pure; raises ``OutOfBlocks``."""
    size = tier.index.block_size
    starts = table.reserved[rows]
    ends = starts + counts
    have = table.num_blocks[rows]
    growth = -(-ends // size) - have
    copied, tails = _copied_tails(tier, table, rows, starts, size)
    blocks = tier.pool.peek(len(copied) + int(growth.sum()))
    fresh, added = blocks[: len(copied)], blocks[len(copied) :]

    table_rows = np.repeat(np.arange(len(rows)), growth)
    columns = np.repeat(have, growth) + ramp(growth)
    tail_columns = starts[copied] // size
    block_table = table.blocks[rows, : int((have + growth).max(initial=0))]
    block_table[table_rows, columns] = added
    block_table[copied, tail_columns] = fresh

    positions = np.repeat(starts, counts) + ramp(counts)
    token_rows = np.repeat(np.arange(len(rows)), counts)
    slots = block_table[token_rows, positions // size].astype(np.int64) * size + positions % size
    pairs = np.stack([tails, fresh], axis=1)
    return Plan(
        step=step,
        rows=rows,
        generations=table.generation[rows],
        previous=table.last_step[rows],
        starts=starts,
        counts=counts,
        tokens=tokens,
        block_table=block_table,
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        slot_mapping=slots,
        copies=(Copies(tier.name, tier.name, pairs),) if len(pairs) else (),
        grown=(rows[table_rows], columns, added),
        replaced=(rows[copied], tail_columns, fresh, tails),
    )


def apply_step(plan: Plan, tier: Tier, table: SequenceTable, fence: Fence) -> None:
    """Make the plan true. The replaced tails stay readable until ``fence``, the step itself, has passed."""
    rows, columns, added = plan.grown
    tail_rows, tail_columns, fresh, tails = plan.replaced
    tier.take(np.concatenate([fresh, added]))
    table.blocks[rows, columns] = added
    table.blocks[tail_rows, tail_columns] = fresh
    if len(tails):
        tier.index.tokens[fresh] = tier.index.tokens[tails]
        # A tail that stays with a sequence of this step needs no fence: it cannot change hands before the step ends.
        kept = np.isin(tails, plan.block_table[np.arange(len(plan.rows)), plan.starts // tier.index.block_size])
        tier.pool.release(tails[kept])
        tier.pool.release(tails[~kept], (fence,))
    table.reserved[plan.rows] = plan.starts + plan.counts
    table.num_blocks[plan.rows] = -(-table.reserved[plan.rows] // tier.index.block_size)
    table.last_step[plan.rows] = plan.step


def undo_step(plan: Plan, tier: Tier, table: SequenceTable, oldest: int) -> None:
    """Take the plan back for the sequences that still live; ``oldest`` is the oldest step left in flight.

    Blocks go back in the order in which a plan made again would take them.
    """
    alive = alive_in(plan, table)
    gone = plan.rows[~alive]
    rows, columns, added = plan.grown
    tail_rows, tail_columns, fresh, tails = plan.replaced
    keep, keep_tail = ~np.isin(rows, gone), ~np.isin(tail_rows, gone)
    table.blocks[rows[keep], columns[keep]] = 0
    table.blocks[tail_rows[keep_tail], tail_columns[keep_tail]] = tails[keep_tail]
    if keep_tail.any():
        tier.pool.acquire(tails[keep_tail])
    tier.pool.release(np.concatenate([fresh[keep_tail], added[keep]])[::-1])
    rows = plan.rows[alive]
    table.reserved[rows] = plan.starts[alive]
    table.num_blocks[rows] = -(-plan.starts[alive] // tier.index.block_size)
    table.last_step[rows] = np.where(plan.previous[alive] >= oldest, plan.previous[alive], 0)


def commit_tokens(
    tier: Tier, table: SequenceTable, row: int, ids: TokenArray, slots: Ints, fences: tuple[Fence, ...]
) -> int:
    """Record the ids of a row's next tokens, and publish the blocks that became full.

    If somebody else published the same content meanwhile, theirs is shared and the row's own is given back once
    ``fences`` have passed. Returns how many blocks that were.
    """
    before = int(table.committed[row])
    table.committed[row] = after = before + len(ids)
    tier.index.tokens.reshape(-1)[slots] = ids
    prompt = table.prompts.get(row)
    if prompt is not None and not np.array_equal(
        prompt.tokens[before:after], ids[: max(len(prompt.tokens) - before, 0)]
    ):
        del table.prompts[row]  # other tokens were run than announced: these names are not theirs
    first, last = before // tier.index.block_size, after // tier.index.block_size
    if first == last:
        return 0
    own = table.blocks[row, first:last].copy()
    kept = tier.publish(own, _names(tier, table, row, first, last))
    twice = kept != own
    if twice.any():
        tier.share(kept[twice])
        tier.pool.release(own[twice][::-1], fences)
        table.blocks[row, first:last] = kept
    return int(twice.sum())


def _names(tier: Tier, table: SequenceTable, row: int, first: int, last: int) -> list[bytes]:
    """Names of the blocks in columns [first, last); those of the prompt were hashed when it was added."""
    prompt = table.prompts.get(row)
    names = prompt.names[first:last] if prompt is not None else []
    if prompt is not None and last >= len(prompt.names):
        del table.prompts[row]
    start = first + len(names)
    if start < last:
        before = tier.index.name(int(table.blocks[row, start - 1])) if start else table.roots[row]
        tokens = tier.index.tokens[table.blocks[row, start:last]].reshape(-1)
        names = names + hash_blocks(names[-1] if names else before, tokens, tier.index.block_size)
    return names


def alive_in(plan: Plan, table: SequenceTable) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which sequences of the plan were not freed since."""
    return np.asarray(table.live[plan.rows] & (table.generation[plan.rows] == plan.generations))


def _copied_tails(tier: Tier, table: SequenceTable, rows: Ints, starts: Ints, size: int) -> tuple[Ints, Blocks]:
    """Batch positions whose partly filled tail must be copied before it is written, and those tails."""
    partial = np.flatnonzero(starts % size)
    tails = table.blocks[rows[partial], starts[partial] // size]
    mine = tier.pool.writable(tails)
    if mine.all():
        return partial[:0], tails[:0]
    shared, tails = partial[~mine], tails[~mine]
    distinct, where, mentions = np.unique(tails, return_inverse=True, return_counts=True)
    pool = tier.pool
    whole = (
        (pool.refs[distinct] == mentions) & (pool.state[distinct] == BlockState.open) & (pool.pending[distinct] == 0)
    )
    by_length = np.argsort(starts[shared], kind="stable")
    longest = np.zeros(len(distinct), dtype=np.int64)
    longest[where[by_length]] = by_length  # the last assignment stands
    return np.delete(shared, longest[whole]), np.delete(tails, longest[whole])


def ramp(counts: Ints) -> Ints:
    """0, 1, … up to each count in turn."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)
