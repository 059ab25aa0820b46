"""A manager and its model, called alike: each call says what must come of it, makes it, and compares.

Rows, flights and moves are the model's; the manager's handles, plans and transfers are found through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pagemgr.errors import (
    InvalidInput,
    OutOfBlocks,
    OutOfSequences,
    PagemgrError,
    PinQuotaExceeded,
    SequenceBusy,
    SequenceTooLong,
    StalePin,
    StepOrderError,
    WrongTier,
)
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.plan import Plan, Transfer
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence
from pagemgr.stats import TierStats

from .model import Model
from .state import Flight, Move, Part, Row

Refusal = PagemgrError | type[PagemgrError] | None
Answer = TypeVar("Answer")
_COUNTED: dict[type[PagemgrError], str] = {
    OutOfBlocks: "out_of_blocks",
    OutOfSequences: "out_of_sequences",
    SequenceTooLong: "sequence_too_long",
    PinQuotaExceeded: "pin_quota_exceeded",
}
_STATES = ("null", "free", "open", "full", "cached", "fenced")
_OWNER = "me"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a manager is made with. Lengths in tokens, sizes in blocks."""

    num_blocks: int
    block_size: int
    max_sequences: int
    max_seq_len: int
    num_host_blocks: int
    pin_quota: int
    prefix_caching: bool
    eviction: str
    debug: int
    compiled: bool


@dataclass(eq=False)
class Event:
    """A fence that passes when it is told to."""

    passed: bool = False

    def query(self) -> bool:
        """True once told so."""
        return self.passed


class Pair:
    """Raises ``AssertionError`` as soon as the two disagree, or whatever error the manager should not have raised."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.manager = BlockManager(**asdict(sizes))
        tiers = {"device": sizes.num_blocks} | ({"host": sizes.num_host_blocks} if sizes.num_host_blocks else {})
        self.model = Model(sizes.block_size, tiers, sizes.prefix_caching, by_release=sizes.eviction == "lru")
        self.handles: dict[Row, Sequence] = {}
        self.plans: dict[Flight, Plan] = {}
        self.transfers: dict[Move, Transfer] = {}
        self.pins: dict[Pin, list[int]] = {}
        self.refused: Counter[str] = Counter()
        """Calls that were refused as they had to be, by the error's name."""
        self.failures: Counter[str] = Counter()
        """Those of them that the manager counts, by the names that it counts them under."""

    def settle(self) -> None:
        """Let both see which fences have passed: a call that is refused need not have looked."""
        if any(pool.holds for pool in self.model.pools.values()):
            self.manager.stats()
            self.model.settle()

    def call(self, verb: Callable[..., Answer], *args: Any, refused: Refusal = None) -> Answer | None:
        """Call the manager. None if it refused as it has to."""
        self.settle()
        try:
            answer = verb(*args)
        except PagemgrError as error:
            kind = refused if isinstance(refused, type) else type(refused)
            if type(error) is not kind or (isinstance(refused, PagemgrError) and vars(error) != vars(refused)):
                raise
            self.refused[kind.__name__] += 1
            if kind in _COUNTED:
                host = getattr(error, "tier", None) == "host"
                self.failures["out_of_host_blocks" if host else _COUNTED[kind]] += 1
            return None
        assert refused is None, f"{verb.__name__} was not refused by {refused!r}"
        return answer

    # Sequences ----------------------------------------------------------------------------------------------------

    def add(self, prompts: list[list[int]], spaces: list[Namespace | None]) -> list[Row]:
        """The rows, none if there was no room for them."""
        longest, limit = max(map(len, prompts)), self.sizes.max_seq_len
        left = self.sizes.max_sequences - len(self.model.rows)
        refused: Refusal = OutOfSequences(len(prompts), left, self.sizes.max_sequences) if len(prompts) > left else None
        refused = SequenceTooLong(longest, limit) if longest > limit else refused
        found = [self.manager.match(prompt, space)[0] for prompt, space in zip(prompts, spaces, strict=True)]
        handles = self.call(self.manager.add_many, prompts, spaces, refused=refused) or []
        rows = []
        for handle, prompt, space, length in zip(handles, prompts, spaces, found, strict=bool(handles)):
            held = self.manager.table.held(handle.row).tolist()
            inside = handle.num_cached_tokens % self.sizes.block_size > 0
            rows.append(self.model.add(prompt, space or Namespace(), held[-1] if inside else None))
            self.handles[rows[-1]] = handle
            assert handle.num_cached_tokens == len(rows[-1].tokens) == length
        return rows

    def fork(self, row: Row, n: int) -> None:
        """Children of a row."""
        left = self.sizes.max_sequences - len(self.model.rows)
        refused: Refusal = OutOfSequences(n, left, self.sizes.max_sequences) if n > left else None
        refused = InvalidInput if n < 1 else self._busy([row]) or refused
        for handle in self.call(self.manager.fork, self.handles[row], n, refused=refused) or []:
            self.handles[self.model.fork(row)] = handle

    def truncate(self, rows: list[Row], lengths: list[int]) -> None:
        """Cut rows back."""
        wrong = any(not 0 <= length <= row.computed for row, length in zip(rows, lengths, strict=True))
        refused = self._busy(rows) or (InvalidInput if wrong else None)
        self.call(self.manager.truncate, self._named(rows), lengths, refused=refused)
        if not refused:
            self.model.truncate(rows, lengths)

    def free(self, rows: list[Row], after: Event | None) -> list[Sequence]:
        """The handles, which are stale now; none if a row was moving."""
        refused = SequenceBusy if any(row.moving for row in rows) else None
        self.call(self.manager.free, self._named(rows), after, refused=refused)
        if refused:
            return []
        self.model.free(rows, after.query if after else None)
        return [self.handles.pop(row) for row in rows]

    # Steps --------------------------------------------------------------------------------------------------------

    def reserve(self, parts: list[Part]) -> Plan | None:
        """A step of these parts, if there is room."""
        refused = self._reserve_refusal(parts)
        given = [part.new if part.early else len(part.new) for part in parts]
        plan = self.call(self.manager.reserve, self._named([part.row for part in parts]), given, refused=refused)
        if plan is not None:
            self._compare_plan(plan, parts)
            self.plans[self.model.flights[-1]] = plan
        return plan

    def commit(self, told: list[bool], accepted: list[int] | None = None) -> None:
        """The oldest step; ids that were not given at reserve are told now, or never. ``accepted`` of them count."""
        flight = self.model.flights[0]
        late = [part.new if tell and not part.early else None for part, tell in zip(flight.parts, told, strict=True)]
        short = zip(flight.parts, accepted or [], strict=False)
        cut = [part.row for part, count in short if count < len(part.new) and part.row.live]
        refused = SequenceBusy if any(self.model.flying(row)[-1] is not flight for row in cut) else None
        given = None if all(new is None for new in late) else late
        self.call(self.manager.commit, self.plans[flight], given, accepted, refused=refused)
        if not refused:
            del self.plans[flight]
            told = [part.early or new is not None for part, new in zip(flight.parts, late, strict=True)]
            self.model.commit(told, accepted)

    def abort(self, flight: Flight) -> bool:
        """This step, if it is the newest of all its rows; whether it was."""
        newest = all(self.model.flying(part.row)[-1] is flight for part in flight.parts if part.row.live)
        self.call(self.manager.abort, self.plans[flight], refused=None if newest else StepOrderError)
        if newest:
            self.model.abort(flight)
            del self.plans[flight]
        return newest

    def _reserve_refusal(self, parts: list[Part]) -> Refusal:
        self.settle()
        rows = [part.row for part in parts]
        if any(row.tier == "host" for row in rows):
            return WrongTier
        if any(row.moving for row in rows):
            return SequenceBusy
        longest = max(part.start + len(part.new) for part in parts)
        if longest > self.sizes.max_seq_len:
            return SequenceTooLong(longest, self.sizes.max_seq_len)
        copies = sum(self.model.copied_tails(rows).values())
        return self._out_of_blocks("device", copies + sum(self.model.growth(p.row, len(p.new)) for p in parts))

    def _compare_plan(self, plan: Plan, parts: list[Part]) -> None:
        """Read the plan as an engine does, and hand what it says to the model."""
        size = self.sizes.block_size
        tables = [[block for block in row if block] for row in plan.block_table.tolist()]
        tails, given, slots = {}, [], []
        for i, (part, table) in enumerate(zip(parts, tables, strict=True)):
            old, full = part.row.blocks, part.start // size
            assert table[:full] == old[:full]
            if table[full : len(old)] != old[full:]:
                tails[i] = table[full]
            given.append(table[len(old) :])
            ends = range(part.start, part.start + len(part.new))
            slots += [table[at // size] * size + at % size for at in ends]
        counts = [len(part.new) for part in parts]
        assert plan.slot_mapping.tolist() == slots
        assert plan.num_tokens == sum(counts)
        assert plan.seq_lens.tolist() == [part.start + len(part.new) for part in parts]
        assert plan.query_start.tolist() == [sum(counts[:i]) for i in range(len(parts) + 1)]
        copies = [(c.source, c.target, *pair) for c in plan.copies for pair in c.pairs.tolist()]
        assert sorted(copies) == sorted(("device", "device", parts[i].row.blocks[-1], tails[i]) for i in tails)
        self.model.reserve(plan.step, parts, tails, given)

    # Tiers --------------------------------------------------------------------------------------------------------

    def swap(self, rows: list[Row], target: str) -> Move | None:
        """Begin to move rows to the other tier, if there is room."""
        verb = self.manager.swap_out if target == "host" else self.manager.swap_in
        if not self.sizes.num_host_blocks:
            self.call(verb, self._named(rows), refused=InvalidInput)
            return None
        refused: Refusal = self._busy(rows) or (WrongTier if any(row.tier == target for row in rows) else None)
        if not refused:
            missing, held = self.model.plan_move(rows, target)
            refused = self._out_of_blocks(target, len(missing), held.values())
        transfer = self.call(verb, self._named(rows), refused=refused)
        if transfer is None:
            return None
        pairs = [pair for copies in transfer.copies for pair in copies.pairs.tolist()]
        assert transfer.num_copied == len(pairs) == len(dict(pairs))
        move = self.model.begin(rows, target, dict(pairs))
        assert [blocks.tolist() for blocks in transfer.moved] == move.moved
        self.transfers[move] = transfer
        return move

    def finish(self, move: Move, after: Event | None) -> None:
        """The move is done."""
        self.call(self.manager.finish, self.transfers.pop(move), after)
        self.model.finish(move, after.query if after else None)

    def cancel(self, move: Move) -> None:
        """The move came to nothing."""
        self.call(self.manager.cancel, self.transfers.pop(move))
        self.model.cancel(move)

    # Pins ---------------------------------------------------------------------------------------------------------

    def pin(self, row: Row, length: int, until: float | None) -> None:
        """Pin a beginning of a row."""
        wanted, pinned = length // self.sizes.block_size, sum(map(len, self.model.pins))
        refused: Refusal = None
        if pinned + wanted > self.sizes.pin_quota:
            refused = PinQuotaExceeded(_OWNER, wanted, pinned, self.sizes.pin_quota)
        refused = InvalidInput if not 0 <= length <= row.known else refused
        refused = SequenceBusy if row.moving else refused
        refused = WrongTier if row.tier == "host" else refused
        pin = self.call(self.manager.pin, self.handles[row], _OWNER, length, until, refused=refused)
        if pin is not None:
            assert pin.length == wanted * self.sizes.block_size
            self.pins[pin] = self.model.pin(row, length)

    def unpin(self, pin: Pin) -> None:
        """A pin ends, or has ended before."""
        blocks = self.pins.pop(pin, None)
        self.call(self.manager.unpin, pin, refused=None if blocks is not None else StalePin(pin.number, pin.owner))
        if blocks is not None:
            self.model.unpin(blocks)

    def expire(self, now: float) -> list[Pin]:
        """The pins whose time has come."""
        ended = [pin for pin in self.pins if pin.until is not None and pin.until <= now]
        assert self.call(self.manager.expire, now) == len(ended)
        for pin in ended:
            self.model.unpin(self.pins.pop(pin))
        return ended

    def clear(self) -> None:
        """Nothing stays cached."""
        assert self.call(self.manager.clear) == self.model.clear()

    # Making room --------------------------------------------------------------------------------------------------

    def preempt(self, parts: list[Part], candidates: list[Row]) -> None:
        """What should go for a step of ``parts``: it goes, and there is room, or as much is missing as was said."""
        before = self.manager.stats()
        counts = [len(part.new) for part in parts]
        rows = [part.row for part in parts]
        plan = self.manager.preemption(self._named(rows), counts, self._named(candidates))
        assert self.manager.stats() == before
        back = {handle: row for row, handle in self.handles.items()}
        swapped, dropped = ([back[handle] for handle in handles] for handles in (plan.swap_out, plan.drop))
        leaving = Counter(block for row in swapped + dropped for block in row.blocks)
        references = self.model.references("device")
        assert plan.blocks == sum(references[block] == count for block, count in leaving.items())
        assert plan.dropped_tokens == sum(row.computed for row in dropped)
        assert self._busy(swapped + dropped) is None
        if swapped:
            under_way = len(self.model.moves)
            self.swap(swapped, "host")
            assert len(self.model.moves) > under_way, "the host had no room for who should go there"
            assert len(self.model.moves[-1].pairs) == plan.swapped_blocks
            self.finish(self.model.moves[-1], None)
        if dropped:
            self.free(dropped, None)
        self.settle()
        if not plan.missing and not self.model.flights and not self.model.pools["device"].holds:
            assert not isinstance(self._reserve_refusal(parts), OutOfBlocks)

    # Comparing ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """All that can be seen of the manager is as in the model, and its own invariants hold."""
        stats = self.manager.stats()
        self.model.settle()
        self.manager.check()
        for tier in stats.tiers:
            self._compare_tier(tier)
        self._compare_names()
        model, table = self.model, self.manager.table
        assert (stats.sequences, stats.steps_in_flight) == (len(model.rows), len(model.flights))
        for row in model.rows:
            at = self.handles[row].row
            assert table.blocks[at, : table.num_blocks[at]].tolist() == row.blocks
            assert (int(table.computed[at]), int(table.committed[at])) == (row.computed, row.known)
        assert self.manager.lengths(self._named(model.rows)).tolist() == [row.computed for row in model.rows]
        counters, totals = stats.counters, model.totals
        assert (counters.prefix_query_tokens, counters.prefix_hit_tokens) == (totals["query"], totals["hit"])
        assert (counters.steps_committed, counters.steps_aborted) == (totals["commits"], totals["aborts"])
        assert (counters.cow_copies, counters.duplicate_blocks) == (totals["copies"], totals["duplicates"])
        assert (counters.tokens_committed, counters.draft_tokens) == (totals["tokens"], totals["drafts"])
        assert (counters.cleared_blocks, counters.invariant_violations) == (totals["cleared"], 0)
        for direction in ("out", "in"):
            moved = (counters.swapped_blocks[direction], counters.swapped_sequences[direction])
            assert moved == (totals[f"blocks {direction}"], totals[f"sequences {direction}"])
            assert counters.swap_failures[direction] == totals[f"cancel {direction}"]
        assert +Counter(counters.failures) == self.failures

    def _compare_tier(self, tier: TierStats) -> None:
        states, totals = Counter(self.model.states(tier.name).values()), self.model.pools[tier.name].totals
        assert {state: getattr(tier, state) for state in _STATES} == {state: states[state] for state in _STATES}
        counted = (tier.allocated_total, tier.released_total, tier.evicted_total)
        assert counted == (totals["allocated"], totals["released"], totals["evicted"])
        held = Counter(block for blocks in self.model.pins for block in blocks) if tier.name == "device" else Counter()
        references = self.model.references(tier.name)
        assert tier.references == references.total() - held.total()
        assert tier.pinned == sum(references[block] == count for block, count in held.items())
        assert tier.waste_slots == self.model.waste(tier.name)
        assert tier.sequences == sum(row.tier == tier.name for row in self.model.rows)

    def _compare_names(self) -> None:
        """Who is found under each name; on the device children went before their parents."""
        for tier in self.manager.tiers:
            published = {int(block) for block in tier.pool.published.nonzero()[0]}
            names = self.model.pools[tier.name].names
            assert published == set(names)
        ways = set(self.model.pools["device"].names.values())
        size = self.sizes.block_size
        assert all(len(tokens) == size or (space, tokens[:-size]) in ways for space, tokens in ways)

    def _named(self, rows: list[Row]) -> list[Sequence]:
        return [self.handles[row] for row in rows]

    def _busy(self, rows: list[Row]) -> type[PagemgrError] | None:
        return SequenceBusy if any(row.moving or self.model.flying(row) for row in rows) else None

    def _out_of_blocks(self, tier: str, needed: int, spared: Collection[int] = ()) -> OutOfBlocks | None:
        """The refusal that ``needed`` blocks must meet; ``spared`` cannot be evicted for them."""
        self.settle()
        states = self.model.states(tier)
        available = sum(state in ("free", "cached") and block not in spared for block, state in states.items())
        fenced = sum(state == "fenced" for state in states.values())
        return OutOfBlocks(needed, available, fenced, tier) if needed > available else None
