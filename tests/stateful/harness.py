"""The manager, the model and the bytes, side by side: how they are made, called and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from typing import Any

import pytest
from device import Device, Event, Reader, contents
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from snapshot import differences, snapshot

from pagemgr.errors import (
    OutOfBlocks,
    OutOfSequences,
    PagemgrError,
    PinQuotaExceeded,
    SequenceBusy,
    SequenceTooLong,
)
from pagemgr.fuzz.model import Model
from pagemgr.fuzz.state import Flight, Move, Row
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.plan import Plan, Transfer
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

NAMESPACES = (None, None, None, Namespace(tenant="x"), Namespace(adapter="x"))
STATES = ("null", "free", "open", "full", "cached", "fenced")
COUNTED = {
    OutOfBlocks: "out_of_blocks",
    OutOfSequences: "out_of_sequences",
    SequenceTooLong: "sequence_too_long",
    PinQuotaExceeded: "pin_quota_exceeded",
}
Refusal = PagemgrError | type[PagemgrError] | None


class Harness(RuleBasedStateMachine):
    """One manager with its model and its storage, of sizes that are drawn."""

    compiled = False

    @initialize(
        size=st.sampled_from([4, 3, 2, 1]),
        blocks=st.integers(7, 24),
        host=st.sampled_from([12, 6, 4, 0]),
        rows=st.integers(4, 10),
        caching=st.integers(0, 5).map(bool),
        short=st.integers(0, 3),
    )
    def start(self, size: int, blocks: int, host: int, rows: int, caching: bool, short: int) -> None:
        self.limit = max((blocks - 1) * size - short, 6)
        self.manager = BlockManager(
            blocks,
            size,
            max_sequences=rows,
            max_seq_len=self.limit,
            num_host_blocks=host,
            prefix_caching=caching,
            pin_quota=6,
            compiled=self.compiled,
        )
        self.max_rows = rows
        self.model = Model(size, {"device": blocks} | ({"host": host} if host else {}), caching)
        self.device = Device(size)
        self.handles: dict[Row, Sequence] = {}
        self.prompts: dict[Row, list[int]] = {}
        self.plans: dict[Flight, Plan] = {}
        self.transfers: dict[Move, Transfer] = {}
        self.pins: list[tuple[Pin, list[int], list[Any]]] = []
        self.copied: set[Move] = set()
        self.events: list[Event] = []
        self.stale: list[Sequence] = []
        self.past: list[list[int]] = [[]]
        self.refused = dict.fromkeys([*COUNTED.values(), "out_of_host_blocks"], 0)
        for prompt in ([0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1]):
            self.added(self.manager.add(prompt), prompt, Namespace())

    def added(self, handle: Sequence, prompt: list[int], namespace: Namespace) -> Row:
        held = self.manager.table.held(handle.row).tolist()
        inside = handle.num_cached_tokens % self.model.size > 0
        row = self.model.add(prompt, namespace, held[-1] if inside else None)
        self.handles[row], self.prompts[row] = handle, prompt
        self.past = [*self.past, prompt][-5:]
        assert handle.num_cached_tokens == len(row.tokens)
        return row

    # Drawing ------------------------------------------------------------------------------------------------------

    def ready(self) -> list[Row]:
        """Rows that a step may name."""
        return [row for row in self.model.rows if row.tier == "device" and not row.moving]

    def idle(self) -> list[Row]:
        """Rows that nothing is under way for."""
        return [row for row in self.model.rows if not self.busy([row])]

    def some(self, data: st.DataObject, fitting: list[Row], most: int) -> list[Row]:
        """A few rows in any order, as a rule of those that fit."""
        rows = fitting if fitting and data.draw(st.integers(0, 7), "fitting") else self.model.rows
        return data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=most, unique=True), "rows")

    def tokens(self, data: st.DataObject, count: int) -> list[int]:
        """Of two values, so that prefixes often agree."""
        bits = data.draw(st.integers(0, 7), "tokens") if count else 0
        return [bits >> at % 3 & 1 for at in range(count)]

    def event(self, data: st.DataObject) -> Event | None:
        """No fence, a new one, or one that others wait for."""
        events = {"none": None, "new": Event(), "shared": self.events[-1] if self.events else None}
        return events[data.draw(st.sampled_from(list(events)), "after")]

    # Calling ------------------------------------------------------------------------------------------------------

    def call(self, verb: Callable[..., Any], *args: Any, refused: Refusal = None) -> Any:
        """Call the manager; if it has to refuse, see that it does so for this reason and that nothing changed."""
        self.manager.stats()  # lets go of what only waited for fences that have passed
        self.model.settle()
        if refused is None:
            return verb(*args)
        kind = refused if isinstance(refused, type) else type(refused)
        before = snapshot(self.manager)
        with pytest.raises(kind) as raised:
            verb(*args)
        assert raised.type is kind
        assert not differences(before, snapshot(self.manager))
        if isinstance(refused, PagemgrError):
            assert vars(raised.value) == vars(refused)
        if kind in COUNTED:
            host = getattr(raised.value, "tier", None) == "host"
            self.refused["out_of_host_blocks" if host else COUNTED[kind]] += 1
        return None

    def named(self, rows: list[Row]) -> list[Sequence]:
        return [self.handles[row] for row in rows]

    def busy(self, rows: list[Row]) -> Refusal:
        return SequenceBusy if any(row.moving or self.model.flying(row) for row in rows) else None

    def out_of_blocks(self, tier: str, needed: int, spared: Set[int] = frozenset()) -> Refusal:
        """The refusal that ``needed`` blocks must meet; ``spared`` cannot be evicted for them."""
        self.model.settle()
        states = self.model.states(tier)
        available = sum(state in ("free", "cached") and block not in spared for block, state in states.items())
        return OutOfBlocks(needed, available, self.model.count(tier, "fenced"), tier) if needed > available else None

    def wait(self, rows: list[Row]) -> None:
        """For copies into these rows' blocks, before somebody lets go of them."""
        self.device.land({(row.tier, block) for row in rows for block in row.blocks})

    def promise(self, rows: list[Row], after: Event | None) -> None:
        """Somebody reads what these rows hold until ``after`` passes."""
        if after is None or after.passed:
            return
        self.events += [after] if after not in self.events else []
        for row in rows:
            if not self.device.is_waiting(self.handles[row].row):
                expected = contents(row.namespace, row.tokens[: row.computed])
                self.device.readers.append(Reader(row.tier, list(row.blocks), expected, after))

    def arrive(self, data: st.DataObject, move: Move) -> None:
        """Finish a transfer; unless its copies were made already, they are made now or by the time of an event."""
        transfer, after = self.transfers[move], self.event(data)
        self.promise(move.rows, after)
        if move not in self.copied and after and not after.passed:
            self.device.move_by(transfer, after)
        elif move not in self.copied:
            self.device.move(transfer)
        self.call(self.manager.finish, transfer, after)
        self.model.finish(move, after.query if after else None)

    # Comparing ----------------------------------------------------------------------------------------------------

    @invariant()
    def manager_is_sound(self) -> None:
        self.manager.check()

    @invariant()
    def bytes_are_right(self) -> None:
        self.device.check_readers()
        table = self.manager.table
        for row in self.model.rows:
            at = self.handles[row].row
            blocks = table.blocks[at][table.blocks[at] > 0].tolist()
            assert blocks == row.blocks
            if not self.device.is_waiting(at) and not self.device.is_arriving(row.tier, blocks):
                expected = contents(row.namespace, row.tokens[: row.computed])
                assert self.device.read(row.tier, blocks, row.computed) == expected, f"row {at} lost what it held"

    @invariant()
    def pinned_bytes_are_right(self) -> None:
        for _, blocks, expected in self.pins:
            if not self.device.is_arriving("device", blocks):
                assert self.device.read("device", blocks, len(expected)) == expected, "a pinned block was written"

    @invariant()
    def lengths_are_right(self) -> None:
        computed = self.manager.lengths(self.named(self.model.rows)).tolist()
        assert computed == [row.computed for row in self.model.rows]

    @invariant()
    def stats_are_right(self) -> None:
        stats = self.manager.stats()
        self.model.settle()
        for tier in stats.tiers:
            states = self.model.states(tier.name).values()
            assert {state: getattr(tier, state) for state in STATES} == {s: list(states).count(s) for s in STATES}
            totals = self.model.pools[tier.name].totals
            counted = (tier.allocated_total, tier.released_total, tier.evicted_total)
            assert counted == (totals["allocated"], totals["released"], totals["evicted"])
            held = (
                Counter(block for pinned in self.model.pins for block in pinned) if tier.name == "device" else Counter()
            )
            assert tier.references == self.model.references(tier.name).total() - held.total()
            assert tier.waste_slots == self.model.waste(tier.name)
            assert tier.pinned == sum(self.model.references(tier.name)[block] == count for block, count in held.items())
            assert tier.sequences == sum(row.tier == tier.name for row in self.model.rows)
        assert (stats.sequences, stats.steps_in_flight) == (len(self.model.rows), len(self.model.flights))

    @invariant()
    def counters_are_right(self) -> None:
        counters, totals = self.manager.stats().counters, self.model.totals
        assert (counters.prefix_query_tokens, counters.prefix_hit_tokens) == (totals["query"], totals["hit"])
        assert (counters.steps_committed, counters.steps_aborted) == (totals["commits"], totals["aborts"])
        assert (counters.cow_copies, counters.duplicate_blocks) == (totals["copies"], totals["duplicates"])
        assert (counters.tokens_committed, counters.draft_tokens) == (totals["tokens"], totals["drafts"])
        for direction in ("out", "in"):
            moved = (counters.swapped_blocks[direction], counters.swapped_sequences[direction])
            assert moved == (totals[f"blocks {direction}"], totals[f"sequences {direction}"])
            assert counters.swap_failures[direction] == totals[f"cancel {direction}"]
        assert counters.failures == self.refused
        assert counters.invariant_violations == 0

    @invariant()
    def prefixes_are_whole(self) -> None:
        """Children go before their parents: whatever can be matched can be reached from the first token on."""
        for pool in self.model.pools.values():
            names = set(pool.names.values())
            for namespace, tokens in names:
                parent = tokens[: -self.model.size]
                assert not parent or (namespace, parent) in names
