"""Bytes, or what stands for them, moved only by what the manager hands out: plans and transfers.

A slot holds what K and V depend on: the namespace and every token up to its own. Whoever reads a block sees whether it
is right. Everything may happen late: a step runs any time before it is committed, a transfer's copies any time before
its fence passes. A block that is given out is poisoned at once, so that giving it out too early shows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagemgr.fuzz.pair import Event
from pagemgr.plan import Copies, Plan, Transfer
from pagemgr.prefix import Namespace

Place = tuple[str, int]
"""A block of a tier."""

POISON = "poison"


def contents(namespace: Namespace, tokens: list[int]) -> list[Any]:
    """What the slots of a sequence hold, in token order."""
    return [(namespace, tuple(tokens[: end + 1])) for end in range(len(tokens))]


@dataclass(eq=False)
class Launch:
    """A step that was reserved and has not run yet, with what its sequences hold once it has."""

    plan: Plan
    expected: list[list[Any]]
    orphans: set[int] = field(default_factory=set)
    """Positions of freed sequences that build on a step which was aborted: nobody reads what comes of them."""


@dataclass(eq=False)
class Reader:
    """Somebody outside (a network send, a copy) who reads blocks until an event passes."""

    tier: str
    blocks: list[int]
    expected: list[Any]
    until: Event


@dataclass(eq=False)
class Device:
    """The storage of all tiers."""

    size: int
    slots: dict[Place, list[Any]] = field(default_factory=dict)
    launched: deque[Launch] = field(default_factory=deque)
    arriving: list[tuple[Transfer, Event]] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    def read(self, tier: str, blocks: list[int], count: int) -> list[Any]:
        """The first ``count`` slots of a row of the block table."""
        content = [value for block in blocks for value in self.slots.get((tier, block), [None] * self.size)]
        return content[:count]

    def poison(self, tier: str, blocks: list[int]) -> None:
        """These were given out: whoever owned them before must be done with them."""
        for block in blocks:
            self.slots[tier, block] = [POISON] * self.size

    # Steps --------------------------------------------------------------------------------------------------------

    def launch(self, plan: Plan, expected: list[list[Any]]) -> None:
        self.launched.append(Launch(plan, expected))

    def run_through(self, step: int) -> None:
        """Run what was launched, up to this step."""
        while self.launched and self.launched[0].plan.step <= step:
            self._run(self.launched.popleft())

    def is_waiting(self, row: int) -> bool:
        """Whether a step of this row of the block table has still to run; its copy-on-write may be part of that."""
        return any(row in launch.plan.rows.tolist() for launch in self.launched)

    def drop(self, plan: Plan) -> None:
        """A step that was aborted before it ran."""
        self.launched = deque(launch for launch in self.launched if launch.plan is not plan)
        gone = set(zip(plan.rows.tolist(), plan.generations.tolist(), strict=True))
        for launch in self.launched:
            if launch.plan.step > plan.step:
                later = zip(launch.plan.rows.tolist(), launch.plan.generations.tolist(), strict=True)
                launch.orphans |= {i for i, row in enumerate(later) if row in gone}

    def _run(self, launch: Launch) -> None:
        plan, expected = launch.plan, launch.expected
        for copies in plan.copies:
            self.land({("device", block) for block in copies.pairs[:, 0].tolist()})
            self._copy(copies)
        tables = [row[row > 0].tolist() for row in plan.block_table]
        self.land({("device", block) for blocks in tables for block in blocks})
        starts = plan.starts.tolist()
        seen = [i for i in range(len(tables)) if i not in launch.orphans]
        for i in seen:
            found = self.read("device", tables[i], starts[i])
            assert found == expected[i][: starts[i]], f"step {plan.step} found other K/V than it needs"
        new = [value for start, whole in zip(starts, expected, strict=True) for value in whole[start:]]
        for slot, value in zip(plan.slot_mapping.tolist(), new, strict=True):
            self.slots["device", slot // self.size][slot % self.size] = value
        for i in seen:
            found = self.read("device", tables[i], len(expected[i]))
            assert found == expected[i], f"step {plan.step} wrote over its own K/V"
        assert ("device", 0) not in self.slots, "the null block was written"

    # Tiers --------------------------------------------------------------------------------------------------------

    def move(self, transfer: Transfer) -> None:
        for copies in transfer.copies:
            self._copy(copies)

    def move_by(self, transfer: Transfer, event: Event) -> None:
        """The copies run just before ``event`` passes."""
        self.arriving.append((transfer, event))

    def land(self, places: set[Place]) -> None:
        """Wait for the copies that write to these blocks, as an engine does before it reads them."""
        for transfer, event in list(self.arriving):
            written = {(transfer.target, b) for copies in transfer.copies for b in copies.pairs[:, 1].tolist()}
            if written & places:
                self.let_pass(event)

    def is_arriving(self, tier: str, blocks: list[int]) -> bool:
        written = {(t.target, b) for t, _ in self.arriving for c in t.copies for b in c.pairs[:, 1].tolist()}
        return any((tier, block) in written for block in blocks)

    def let_pass(self, event: Event) -> None:
        self.check_readers()
        for transfer in [transfer for transfer, until in self.arriving if until is event]:
            self.move(transfer)
        self.arriving = [(transfer, until) for transfer, until in self.arriving if until is not event]
        event.passed = True
        self.readers = [reader for reader in self.readers if reader.until is not event]

    def check_readers(self) -> None:
        """Who was promised that blocks stay as they are finds them so."""
        for reader in self.readers:
            read = self.read(reader.tier, reader.blocks, len(reader.expected))
            assert read == reader.expected, f"blocks {reader.blocks} of {reader.tier} changed before their fence passed"

    def _copy(self, copies: Copies) -> None:
        pairs = np.asarray(copies.pairs).tolist()
        assert len({b for _, b in pairs}) == len(pairs), "two copies into one block"
        for source, target in pairs:
            self.slots[copies.target, target] = list(self.slots[copies.source, source])
