"""A manager beside its model (``pagemgr.fuzz.pair``) and beside the bytes, in a machine of hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device import Device, Event, Reader, contents
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from snapshot import differences, snapshot

from pagemgr.fuzz.pair import Pair, Refusal, Sizes
from pagemgr.fuzz.state import Move, Part, Row
from pagemgr.pins import Pin
from pagemgr.plan import Plan
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

NAMESPACES = (None, None, None, Namespace(tenant="x"), Namespace(adapter="x"))


class AtomicPair(Pair):
    """Sees as well that a refused call changed nothing at all."""

    def call(self, verb: Callable[..., Any], *args: Any, refused: Refusal = None) -> Any:
        if refused is None:
            return super().call(verb, *args)
        self.settle()
        before = snapshot(self.manager)
        super().call(verb, *args, refused=refused)
        assert not differences(before, snapshot(self.manager))
        return None


class Harness(RuleBasedStateMachine):
    """One pair and its storage, of sizes that are drawn."""

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
        self.pair = AtomicPair(
            Sizes(
                num_blocks=blocks,
                block_size=size,
                max_sequences=rows,
                max_seq_len=self.limit,
                num_host_blocks=host,
                pin_quota=6,
                prefix_caching=caching,
                eviction="lru",
                debug=1,
                compiled=self.compiled,
            )
        )
        self.model, self.manager, self.max_rows = self.pair.model, self.pair.manager, rows
        self.device = Device(size)
        self.prompts: dict[Row, list[int]] = {}
        self.pinned: dict[Pin, list[Any]] = {}
        self.copied: set[Move] = set()
        self.events: list[Event] = []
        self.stale: list[Sequence] = []
        self.ended: list[Plan] = []
        self.past: list[list[int]] = [[]]
        self.add_rows([[0, 1, 0, 1, 0, 1]], [None])
        self.add_rows([[0, 1, 0, 1, 1]], [None])

    # Drawing ------------------------------------------------------------------------------------------------------

    def ready(self) -> list[Row]:
        """Rows that a step may name."""
        return [row for row in self.model.rows if row.tier == "device" and not row.moving]

    def idle(self) -> list[Row]:
        """Rows that nothing is under way for."""
        return [row for row in self.model.rows if not row.moving and not self.model.flying(row)]

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

    def add_rows(self, prompts: list[list[int]], spaces: list[Namespace | None]) -> list[Row]:
        rows = self.pair.add(prompts, spaces)
        self.prompts |= dict(zip(rows, prompts, strict=True))
        self.past = [*self.past, *prompts][-5:]
        return rows

    def step_of(self, parts: list[Part], at_once: bool) -> None:
        """Reserve, and see to it that the step runs at some time."""
        before = [len(part.row.blocks) for part in parts]
        plan = self.pair.reserve(parts)
        if plan is None:
            return
        new = [block for part, held in zip(parts, before, strict=True) for block in part.row.blocks[held:]]
        copies = [block for group in plan.copies for block in group.pairs[:, 1].tolist()]
        self.device.poison("device", new + copies)
        self.device.launch(plan, [contents(part.row.namespace, part.row.tokens) for part in parts])
        if at_once and len(self.model.flights) == 1:
            self.end_step([True] * len(parts))

    def end_step(self, told: list[bool], accepted: list[int] | None = None) -> None:
        """The oldest one, after it has run."""
        flight = self.model.flights[0]
        plan = self.pair.plans[flight]
        self.device.run_through(flight.number)
        self.pair.commit(told, accepted)
        if flight not in self.model.flights:
            self.ended = [*self.ended, plan][-4:]

    def wait(self, rows: list[Row]) -> None:
        """For copies into these rows' blocks, before somebody lets go of them."""
        self.device.land({(row.tier, block) for row in rows for block in row.blocks})

    def promise(self, rows: list[Row], after: Event | None) -> None:
        """Somebody reads what these rows hold until ``after`` passes."""
        if after is None or after.passed:
            return
        self.events += [after] if after not in self.events else []
        for row in rows:
            if not self.device.is_waiting(self.pair.handles[row].row):
                expected = contents(row.namespace, row.tokens[: row.computed])
                self.device.readers.append(Reader(row.tier, list(row.blocks), expected, after))

    def arrive(self, data: st.DataObject, move: Move) -> None:
        """Finish a transfer; unless its copies were made already, they are made now or by the time of an event."""
        transfer, after = self.pair.transfers[move], self.event(data)
        self.promise(move.rows, after)
        if move not in self.copied and after and not after.passed:
            self.device.move_by(transfer, after)
        elif move not in self.copied:
            self.device.move(transfer)
        self.pair.finish(move, after)

    # Comparing ----------------------------------------------------------------------------------------------------

    @invariant()
    def manager_is_as_the_model(self) -> None:
        self.pair.check()

    @invariant()
    def bytes_are_right(self) -> None:
        self.device.check_readers()
        for row in self.model.rows:
            at = self.pair.handles[row].row
            if not self.device.is_waiting(at) and not self.device.is_arriving(row.tier, row.blocks):
                expected = contents(row.namespace, row.tokens[: row.computed])
                assert self.device.read(row.tier, row.blocks, row.computed) == expected, f"row {at} lost what it held"

    @invariant()
    def pinned_bytes_are_right(self) -> None:
        for pin, expected in self.pinned.items():
            blocks = self.pair.pins[pin]
            if not self.device.is_arriving("device", blocks):
                assert self.device.read("device", blocks, len(expected)) == expected, "a pinned block was written"
