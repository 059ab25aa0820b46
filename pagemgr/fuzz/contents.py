"""What the blocks of all tiers hold, moved by nothing but copies and the slots of steps.

A slot holds what its K and V depend on: the layer group, the namespace and every token up to its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pagemgr.manager import BlockManager
from pagemgr.plan import Copies, Plan, Promotion, Transfer
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

Place = tuple[str, int]
"""A block of a tier."""

POISON = "poison"


@dataclass(eq=False)
class Stream:
    """A sequence as its engine knows it."""

    handle: Sequence
    space: Namespace
    tokens: list[int]
    begun: int
    """Tokens that it started with."""
    longest: int
    """As far as steps were committed."""
    flying: int = 0
    moving: bool = False
    live: bool = True


@dataclass(eq=False)
class Flight:
    """A step in flight, which may have run. ``late`` are the ids that come at commit, if they do."""

    plan: Plan
    streams: list[Stream]
    histories: list[list[int]]
    new: list[list[int]]
    late: list[list[int]]
    ran: bool = False


@dataclass(eq=False)
class Move:
    """A transfer or promotion under way, whose copies may have been made."""

    what: Transfer | Promotion
    streams: list[Stream]
    copied: bool = False


class Contents:
    """The bytes of one manager's blocks, or what stands for them."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self._slots: dict[Place, list[Any]] = {}

    def copy(self, copies: Iterable[Copies]) -> None:
        """Make these copies, in this order."""
        for group in copies:
            for source, target in group.pairs.tolist():
                self._slots[group.target, target] = list(self._slots[group.source, source])

    def of(self, places: Iterable[Place]) -> dict[Place, list[Any]]:
        """What is in these blocks, so far as anything is."""
        return {place: list(self._slots[place]) for place in places if place in self._slots}

    def held(self, stream: Stream) -> list[Place]:
        """The blocks of a sequence, all groups."""
        table = self.manager.table
        rows = table.rows([stream.handle]).tolist()
        return [(self.tier(stream), block) for row in rows for block in table.held(row).tolist()]

    def tier(self, stream: Stream) -> str:
        """Where a sequence is."""
        return self.manager.tiers[int(self.manager.table.tier[stream.handle.row])].name

    def seen(self, stream: Stream) -> None:
        """Assert that a sequence finds all that its next token reads, through the block table."""
        table = self.manager.table
        for group, row in enumerate(table.rows([stream.handle]).tolist()):
            self._read(self.tier(stream), group, table.blocks[row], stream.space, stream.tokens)

    def run(self, flight: Flight) -> None:
        """What the device does for a step: copies, then reads and writes through its table and slots alone."""
        plan, size, count = flight.plan, self.manager.block_size, flight.plan.num_tokens
        self.copy(plan.copies)
        for blocks, first in zip(plan.block_table, (-(-plan.starts // size)).tolist(), strict=True):
            self._slots |= {("device", block): [POISON] * size for block in blocks[first:].tolist() if block}
        self._read_all(flight, flight.histories)
        for group in range(plan.num_groups):
            slots = iter(plan.slot_mapping[group * count : (group + 1) * count].tolist())
            for stream, history, new in zip(flight.streams, flight.histories, flight.new, strict=True):
                for end in range(len(history) + 1, len(history) + len(new) + 1):
                    slot = next(slots)
                    self._slots["device", slot // size][slot % size] = (group, stream.space, (*history, *new)[:end])
        flight.ran = True
        self._read_all(flight, [history + new for history, new in zip(flight.histories, flight.new, strict=True)])

    def _read_all(self, flight: Flight, contents: list[list[int]]) -> None:
        """Through the table of the step; what is left of sequences that were freed is read by nobody."""
        tables = flight.plan.block_table.reshape(flight.plan.num_groups, len(flight.streams), -1)
        for i, (stream, tokens) in enumerate(zip(flight.streams, contents, strict=True)):
            for group in range(len(tables)) if stream.live else ():
                self._read("device", group, tables[group, i], stream.space, tokens)

    def _read(self, tier: str, group: int, blocks: Any, space: Namespace, tokens: list[int]) -> None:
        size, window = self.manager.block_size, self.manager.table.windows[group]
        for at in range(0 if window is None else max(len(tokens) - window + 1, 0), len(tokens)):
            slot = self._slots[tier, int(blocks[at // size])][at % size]
            assert slot == (group, space, tuple(tokens[: at + 1])), (tier, group, at, slot)
