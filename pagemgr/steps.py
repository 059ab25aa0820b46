"""One step on the block table: planned without changing anything, then applied or undone.

Copy-on-write is decided here. A step writes into the tail block of a sequence in place only if nobody else can ever
read what it overwrites. So a tail is replaced by a copy if others share it, if it is published (after a truncate into
it), or if it waits for a fence: then somebody who let go of it may still be reading it, or may get it back by an abort.
One exception saves a copy: if all owners of a shared tail are in the batch, the longest keeps it, as it writes past
what the others hold; among equals, the last.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, SequenceBusy
from .eviction import Blocks
from .ids import TokenArray, pack_tokens
from .layout import NULL_BLOCK
from .plan import Copies, Ints, Plan
from .pool import BlockState, Fence, tally
from .prefix import DIGEST_BYTES
from .second_level import SecondLevel
from .sequences import IDLE, SequenceTable
from .tier import Tier


@dataclass(frozen=True, slots=True)
class StepFence:
    """Passes when the step has ended."""

    step: int
    in_flight: dict[int, Plan]

    def query(self) -> bool:
        """Whether it has."""
        return self.step not in self.in_flight


def plan_step(
    step: int,
    tier: Tier,
    table: SequenceTable,
    rows: Ints,
    generations: Ints,
    counts: Ints,
    tokens: TokenArray,
    second: SecondLevel | None,
) -> Plan:
    """Decide which blocks the batch gets, and what goes down to ``second`` for them. Pure; raises ``OutOfBlocks``."""
    size = tier.index.block_size
    starts = table.reserved[rows]
    ends = starts + counts
    have = table.num_blocks[rows]
    growth = -(-ends // size) - have
    copied, tails = _copied_tails(tier, table, rows, starts, size)
    blocks = tier.pool.peek(len(copied) + int(growth.sum()))
    fresh, added = blocks[: len(copied)], blocks[len(copied) :]
    demotion = second.plan(blocks) if second is not None else None
    down = (demotion.copies(tier.name, second.host.name),) if demotion is not None and second is not None else ()

    block_table = table.blocks[rows, : int((have + growth).max(initial=0))]
    block_table[np.repeat(np.arange(len(rows)), growth), np.repeat(have, growth) + ramp(growth)] = added
    block_table[copied, starts[copied] // size] = fresh
    positions = np.repeat(starts, counts) + ramp(counts)
    owners = np.repeat(np.arange(len(rows)), counts)
    pairs = np.stack([tails, fresh], axis=1)
    return Plan(
        step=step,
        num_groups=len(table.windows),
        rows=rows,
        generations=generations,
        previous=table.last_step[rows],
        starts=starts,
        counts=counts,
        tokens=tokens,
        block_table=block_table,
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        slot_mapping=block_table[owners, positions // size].astype(np.int64) * size + positions % size,
        copies=(*down, Copies(tier.name, tier.name, pairs)) if len(pairs) else down,
        replaced=(copied, fresh, tails),
        demotion=demotion,
    )


def apply_step(plan: Plan, tier: Tier, table: SequenceTable, fence: Fence) -> None:
    """Make the plan true. The replaced tails stay readable until ``fence``, the step itself, has passed."""
    size = tier.index.block_size
    rows, have = plan.rows, table.num_blocks[plan.rows]
    growth = -(-(plan.starts + plan.counts) // size) - have
    owners, columns = np.repeat(np.arange(len(rows)), growth), np.repeat(have, growth) + ramp(growth)
    added = plan.block_table[owners, columns]
    copied, fresh, tails = plan.replaced
    tier.take(np.concatenate([fresh, added]))
    table.blocks[rows[owners], columns] = added
    table.blocks[rows[copied], plan.starts[copied] // size] = fresh
    if len(tails):
        tier.index.tokens[fresh] = tier.index.tokens[tails]
        # A tail that stays with a sequence of this step needs no fence: it cannot change hands before the step ends.
        kept = np.isin(tails, plan.block_table[np.arange(len(rows)), plan.starts // size])
        tier.pool.release(*tally(tails[kept]))
        if not kept.all():
            tier.pool.release(*tally(tails[~kept]), (fence,))
    table.reserved[rows] = plan.starts + plan.counts
    table.num_blocks[rows] = have + growth
    table.last_step[rows] = plan.step


def undo_step(plan: Plan, tier: Tier, table: SequenceTable, oldest: int) -> None:
    """Take the plan back for the sequences that still live; ``oldest`` is the oldest step left in flight.

    Blocks go back in the order in which a plan made again would take them.
    """
    size = tier.index.block_size
    alive = alive_in(plan, table)
    rows, starts = plan.rows[alive], plan.starts[alive]
    had = -(-starts // size)
    growth = table.num_blocks[rows] - had
    grown, columns = np.repeat(rows, growth), np.repeat(had, growth) + ramp(growth)
    added = table.blocks[grown, columns]
    copied, fresh, tails = plan.replaced
    still = alive[copied]
    copied, fresh, tails = copied[still], fresh[still], tails[still]
    table.blocks[grown, columns] = NULL_BLOCK
    table.blocks[plan.rows[copied], plan.starts[copied] // size] = tails
    tier.pool.acquire(*tally(tails))
    tier.pool.release(np.concatenate([fresh, added])[::-1])
    table.reserved[rows] = starts
    table.num_blocks[rows] = had
    table.last_step[rows] = np.where(plan.previous[alive] >= oldest, plan.previous[alive], IDLE)


def accepted_counts(
    plan: Plan, accepted: SequenceOf[int] | None, alive: npt.NDArray[np.bool_], table: SequenceTable
) -> Ints | None:
    """How many tokens of each row count, if not all of them do. Raises ``InvalidInput``, ``SequenceBusy``."""
    if accepted is None:
        return None
    kept = table.spread(pack_tokens(accepted).astype(np.int64))
    if len(kept) != len(plan.rows) or (kept < 1).any() or (kept > plan.counts).any():
        counts = plan.counts[: plan.num_seqs].tolist()
        raise InvalidInput(f"accepted must be from 1 to the counts of the step, {counts!s:.200}, got {accepted!s:.200}")
    refused = plan.rows[alive & (kept < plan.counts)]
    for row in refused[table.last_step[refused] != plan.step].tolist():
        raise SequenceBusy(row, "refuse drafts of", f"step {table.last_step[row]} builds on them")
    return kept if (kept < plan.counts).any() else None


def shorten_step(
    plan: Plan, accepted: Ints, ids: TokenArray, tier: Tier, table: SequenceTable, fences: tuple[Fence, ...]
) -> tuple[Plan, TokenArray]:
    """Of the tokens that the step ran, each row keeps its first ``accepted``; slots beyond go back after ``fences``.

    Returns what is left of the step and of its ``ids``.
    """
    size = tier.index.block_size
    shorter_rows = alive_in(plan, table) & (accepted < plan.counts)
    rows, ends = plan.rows[shorter_rows], (plan.starts + accepted)[shorter_rows]
    keep = -(-ends // size)
    tier.pool.release(*table.leaf_first(rows, keep), fences)
    table.cut(rows, keep)
    table.reserved[rows] = ends
    tokens = np.repeat(plan.query_start[:-1].astype(np.int64), accepted) + ramp(accepted)
    shorter = replace(
        plan,
        counts=accepted,
        tokens=plan.tokens[tokens],
        query_start=np.concatenate([[0], np.cumsum(accepted)]).astype(np.int32),
        slot_mapping=plan.slot_mapping[tokens],
    )
    return shorter, ids[tokens]


def commit_step(plan: Plan, ids: TokenArray | None, tier: Tier, table: SequenceTable, fences: tuple[Fence, ...]) -> int:
    """The step has run: advance its sequences, record ids that are known, publish the blocks that became full.

    If somebody else published the same content meanwhile, theirs is shared and the sequence's own is given back once
    ``fences`` have passed. Returns how many blocks that were. Sequences that were freed are passed over, and so are
    negative ids, which are unknown, and ids that follow unknown ones.
    """
    size = tier.index.block_size
    alive = alive_in(plan, table)
    live = plan.rows[alive]
    named = alive & (table.committed[plan.rows] == table.computed[plan.rows])
    table.computed[live] += plan.counts[alive]
    table.last_step[live[table.last_step[live] == plan.step]] = IDLE
    if ids is None:
        return 0
    batch = np.flatnonzero(named & (ids[plan.query_start[:-1]] >= 0))
    rows, counts = plan.rows[batch], plan.counts[batch]
    where = np.repeat(plan.query_start[batch].astype(np.int64), counts) + ramp(counts)
    tier.index.tokens.reshape(-1)[plan.slot_mapping[where]] = ids[where]
    before = table.committed[rows]
    table.committed[rows] = before + counts
    if table.prompts:
        for i, row in enumerate(rows.tolist()):
            start = int(plan.query_start[batch[i]])
            _compare_prompt(table, row, ids[start : start + int(counts[i])], int(before[i]))
    first, last = before // size, (before + counts) // size
    filled = np.flatnonzero(last > first)
    names = [_names(tier, table, int(rows[i]), int(first[i]), int(last[i])) for i in filled.tolist()]
    full = last[filled] - first[filled]
    owners, columns = np.repeat(rows[filled], full), np.repeat(first[filled], full) + ramp(full)
    own = table.blocks[owners, columns]
    chained = (columns > 0) & (table.window[owners] == 0)  # a block in a window outlives those before it
    parents = np.where(chained, table.blocks[owners, columns - 1], NULL_BLOCK)
    before_first = [_name_before(tier, table, int(rows[i]), int(first[i])) for i in filled.tolist()]
    groups = (owners // table.max_sequences).astype(np.uint8)
    kept = tier.publish(own, b"".join(names), parents, groups)
    new = kept == own
    if new.any():
        chain = b"".join(start + run[:-DIGEST_BYTES] for start, run in zip(before_first, names, strict=True))
        tier.index.lead(own[new], np.frombuffer(chain, np.uint8).reshape(-1, DIGEST_BYTES)[new].tobytes())
    share_duplicates(tier, table, owners, columns, own, kept, fences)
    return int(np.count_nonzero(~new))


def leave_windows(rows: Ints, tier: Tier, table: SequenceTable, rollback: int, fences: tuple[Fence, ...]) -> None:
    """Give back the blocks that left the windows of these rows, once ``fences`` have passed.

    A row stays ready to be cut back by ``rollback`` tokens.
    """
    size = tier.index.block_size
    rows = rows[table.window[rows] > 0]
    gone = (table.computed[rows] - rollback - table.window[rows] + 1) // size
    leaving = gone > table.dropped[rows]
    rows, gone = rows[leaving], gone[leaving]
    if not len(rows):
        return
    left: list[Blocks] = []
    for row, end in zip(rows.tolist(), gone.tolist(), strict=True):
        blocks = table.blocks[row, table.dropped[row] : end]
        table.roots[row] = tier.index.names[blocks[-1]]  # worthless if unknown ids came first: then nothing follows it
        left.append(blocks[::-1].copy())
        blocks[:] = NULL_BLOCK
    table.dropped[rows] = gone
    tier.pool.release(*tally(np.concatenate(left)), fences)


def share_duplicates(
    tier: Tier, table: SequenceTable, rows: Ints, columns: Ints, own: Blocks, kept: Blocks, fences: tuple[Fence, ...]
) -> None:
    """Where another block stands for what a row computed, the row takes it and gives its own back.

    Rows are in the order of the batch, and columns ascend: each row gives back its children before their parents.
    """
    twice = kept != own
    if twice.any():
        rows, columns, own, kept = rows[twice], columns[twice], own[twice], kept[twice]
        tier.share(*tally(kept))
        table.blocks[rows, columns] = kept
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        leaf_first = np.concatenate([part[::-1] for part in np.split(own, starts[1:])])
        tier.pool.release(leaf_first, 1, fences)


def _compare_prompt(table: SequenceTable, row: int, ids: TokenArray, before: int) -> None:
    """Other tokens may be run than ``add`` announced: then the names that were made then are not theirs."""
    prompt = table.prompts.get(row)
    if prompt is not None:
        announced = prompt.tokens[before : before + len(ids)]
        if not np.array_equal(announced, ids[: len(announced)]):
            del table.prompts[row]


def _names(tier: Tier, table: SequenceTable, row: int, first: int, last: int) -> bytes:
    """Names of the blocks in columns [first, last); those of the prompt were hashed when it was added."""
    names = b""
    prompt = table.prompts.get(row)
    if prompt is not None:
        names = prompt.names[first * DIGEST_BYTES : last * DIGEST_BYTES]
        if last * DIGEST_BYTES >= len(prompt.names):
            del table.prompts[row]
    start = first + len(names) // DIGEST_BYTES
    if start < last:
        tokens = tier.index.tokens[table.blocks[row, start:last]].reshape(-1)
        names += tier.index.hash(names[-DIGEST_BYTES:] or _name_before(tier, table, row, start), tokens)
    return names


def _name_before(tier: Tier, table: SequenceTable, row: int, column: int) -> bytes:
    """The name of the prefix that ends where this column of a row begins."""
    if column > table.dropped[row]:
        return tier.index.names_of(table.blocks[row, column - 1 : column])
    root: bytes = table.roots[row].tobytes()
    return root


def alive_in(plan: Plan, table: SequenceTable) -> npt.NDArray[np.bool_]:
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
