"""Every verb of the manager in random order, several steps and transfers under way, against a model and in bytes."""

from __future__ import annotations

from device import contents
from harness import NAMESPACES, Harness, Refusal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from pagemgr.errors import (
    InvalidInput,
    OutOfSequences,
    PinQuotaExceeded,
    SequenceBusy,
    SequenceTooLong,
    StalePin,
    StaleSequence,
    StepOrderError,
    WrongTier,
)
from pagemgr.fuzz.state import Flight, Part
from pagemgr.plan import Plan
from pagemgr.prefix import Namespace

DATA = st.data()
LIKELY = st.integers(0, 7).map(bool)
"""True seven times in eight."""


class Machine(Harness):
    """Rules draw a call that may be wrong, say what must come of it, and make it."""

    # Sequences ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.model.rows) < self.max_rows)
    @rule(data=DATA, count=st.integers(1, 2), run=LIKELY)
    def add(self, data: st.DataObject, count: int, run: bool) -> None:
        prompts, spaces = [], []
        for _ in range(min(count, self.max_rows - len(self.model.rows))):
            past = data.draw(st.sampled_from(self.past), "past")
            keep = len(past) - data.draw(st.integers(0, self.model.size), "cut")
            more = self.tokens(data, data.draw(st.integers(0, 2 * self.model.size + 1), "more"))
            prompts.append((past[: max(keep, 0)] + more)[: self.limit])
            spaces.append(data.draw(st.sampled_from(NAMESPACES), "namespace"))
        handles = self.call(self.manager.add_many, prompts, spaces)
        new = zip(handles, prompts, spaces, strict=True)
        for row in [self.added(handle, prompt, space or Namespace()) for handle, prompt, space in new]:
            rest = self.prompts[row][len(row.tokens) :]
            if run and rest:
                self.step_of([Part(row, len(row.tokens), rest, True, None)], True)

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA, n=st.sampled_from([1, 2, 3, 0]))
    def fork(self, data: st.DataObject, n: int) -> None:
        row = self.some(data, [row for row in self.idle() if row.tokens], 1)[0]
        left = self.max_rows - len(self.model.rows)
        n = min(n, max(left, 1)) if data.draw(LIKELY, "fits") else n
        refused: Refusal = OutOfSequences(n, left, self.max_rows) if n > left else None
        refused = InvalidInput if n < 1 else self.busy([row]) or refused
        for handle in self.call(self.manager.fork, self.handles[row], n, refused=refused) or []:
            child = self.model.fork(row)
            self.handles[child], self.prompts[child] = handle, self.prompts[row]

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def truncate(self, data: st.DataObject) -> None:
        rows = self.some(data, [row for row in self.idle() if row.tokens], 2)
        lengths = [max(row.computed - data.draw(st.integers(0, 2 * self.model.size), "cut"), 0) for row in rows]
        if not data.draw(LIKELY, "fits"):
            lengths[-1] = data.draw(st.sampled_from([rows[-1].computed + 1, -1]), "length")
        wrong = any(not 0 <= length <= row.computed for row, length in zip(rows, lengths, strict=True))
        refused = self.busy(rows) or (InvalidInput if wrong else None)
        self.wait(rows)
        self.call(self.manager.truncate, self.named(rows), lengths, refused=refused)
        if not refused:
            self.model.truncate(rows, lengths)

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def free(self, data: st.DataObject) -> None:
        rows = self.some(data, [row for row in self.model.rows if not row.moving], 3)
        after = self.event(data)
        refused = SequenceBusy if any(row.moving for row in rows) else None
        self.wait(rows)
        self.call(self.manager.free, self.named(rows), after, refused=refused)
        if refused:
            return
        self.promise(rows, after)
        self.stale = (self.stale + self.named(rows))[-4:]
        self.past = [*self.past, *(row.tokens[: row.computed] for row in rows)][-5:]
        self.model.free(rows, after.query if after else None)

    @precondition(lambda self: self.events)
    @rule(data=DATA)
    def event_passes(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.events), "event")
        self.events.remove(event)
        self.device.let_pass(event)

    # Steps --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.ready())
    @rule(data=DATA, at_once=LIKELY)
    def prefill(self, data: st.DataObject, at_once: bool) -> None:
        """What is left of a prompt, or all but a token of it."""
        row = data.draw(st.sampled_from(self.ready()), "row")
        rest = self.prompts[row][len(row.tokens) :] or self.tokens(data, 1)
        less = len(rest) > 1 and not data.draw(LIKELY, "whole")
        self.step_of([Part(row, len(row.tokens), rest[: len(rest) - less], data.draw(LIKELY, "early"), None)], at_once)

    @precondition(lambda self: self.ready())
    @rule(data=DATA, at_once=st.booleans())
    def decode(self, data: st.DataObject, at_once: bool) -> None:
        """One token for all sequences that can: what engines do most."""
        early = data.draw(st.booleans(), "early")
        self.step_of([Part(row, len(row.tokens), self.tokens(data, 1), early, None) for row in self.ready()], at_once)

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def reserve(self, data: st.DataObject) -> None:
        """Any batch of any counts; what is given of the tokens varies from row to row."""
        counts = st.integers(1, 2 * self.model.size + 1)
        parts = []
        for row in self.some(data, self.ready(), 4):
            new = self.tokens(data, data.draw(counts, "count"))
            parts.append(Part(row, len(row.tokens), new, data.draw(st.booleans(), "early"), None))
        self.step_of(parts, False)

    @precondition(lambda self: any(row in self.ready() and row.computed for row in self.idle()))
    @rule(data=DATA, cut=st.integers(1, 3), at_once=LIKELY)
    def roll_back(self, data: st.DataObject, cut: int, at_once: bool) -> None:
        """A few tokens are taken back and others run in their place, as after a wrong guess."""
        rows = [row for row in self.idle() if row in self.ready() and row.computed]
        row = data.draw(st.sampled_from(rows), "row")
        length = max(row.computed - cut, 0)
        self.wait([row])
        self.call(self.manager.truncate, self.named([row]), [length])
        self.model.truncate([row], [length])
        self.step_of([Part(row, length, self.tokens(data, cut), data.draw(LIKELY, "early"), None)], at_once)

    @precondition(lambda self: self.model.count("device", "cached") and len(self.model.rows) < self.max_rows)
    @rule(data=DATA)
    def squeeze(self, data: st.DataObject) -> None:
        """A sequence comes and goes for which blocks must be evicted."""
        count = self.model.count("device", "free") + data.draw(st.integers(1, 4), "evicted")
        row = self.added(self.call(self.manager.add), [], Namespace())
        self.step_of([Part(row, 0, self.tokens(data, min(count * self.model.size, self.limit)), False, None)], True)
        self.call(self.manager.free, self.named([row]))
        self.model.free([row])

    def step_of(self, parts: list[Part], at_once: bool) -> None:
        refused = self.refusal(parts)
        given = [part.new if part.early else len(part.new) for part in parts]
        plan = self.call(self.manager.reserve, self.named([part.row for part in parts]), given, refused=refused)
        if refused:
            return
        self.reserved(plan, parts)
        if at_once and len(self.model.flights) == 1:
            self.end(self.model.flights[0], [True] * len(parts))

    def refusal(self, parts: list[Part]) -> Refusal:
        rows = [part.row for part in parts]
        if any(row.tier == "host" for row in rows):
            return WrongTier
        if any(row.moving for row in rows):
            return SequenceBusy
        longest = max(part.start + len(part.new) for part in parts)
        if longest > self.limit:
            return SequenceTooLong(longest, self.limit)
        copies = sum(self.model.copied_tails(rows).values())
        return self.out_of_blocks("device", copies + sum(self.model.growth(p.row, len(p.new)) for p in parts))

    def reserved(self, plan: Plan, parts: list[Part]) -> None:
        """Read the plan as an engine does, and hand what it says to the model and the device."""
        size = self.model.size
        tables = [row[row > 0].tolist() for row in plan.block_table]
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
        assert plan.query_start.tolist() == [sum(counts[:i]) for i in range(len(parts) + 1)]
        assert plan.seq_lens.tolist() == [part.start + len(part.new) for part in parts]
        copies = [(c.source, c.target, *pair) for c in plan.copies for pair in c.pairs.tolist()]
        assert sorted(copies) == sorted(("device", "device", parts[i].row.blocks[-1], tails[i]) for i in tails)
        self.model.reserve(plan.step, parts, tails, given)
        self.plans[self.model.flights[-1]] = plan
        self.device.poison("device", [block for blocks in given for block in blocks] + list(tails.values()))
        self.device.launch(plan, [contents(part.row.namespace, part.row.tokens) for part in parts])

    @precondition(lambda self: self.device.launched)
    @rule()
    def run_a_step(self) -> None:
        self.device.run_through(self.device.launched[0].plan.step)

    @precondition(lambda self: self.model.flights)
    @rule(data=DATA)
    def commit(self, data: st.DataObject) -> None:
        flight = self.model.flights[0]
        accepted = None
        if not data.draw(LIKELY, "all accepted"):
            accepted = [data.draw(st.integers(1, len(part.new)), "accepted") for part in flight.parts]
        self.end(flight, [data.draw(LIKELY, "told") for _ in flight.parts], accepted)

    def end(self, flight: Flight, told: list[bool], accepted: list[int] | None = None) -> None:
        """Commit; tokens that were not given before are told now, or never. Drafts that are refused are rolled back."""
        late = [part.new if tell and not part.early else None for part, tell in zip(flight.parts, told, strict=True)]
        self.device.run_through(flight.number)
        short = zip(flight.parts, accepted or [], strict=False)
        rows = [part.row for part, count in short if count < len(part.new) and part.row.live]
        refused = SequenceBusy if any(self.model.flying(row)[-1] is not flight for row in rows) else None
        given = None if all(new is None for new in late) else late
        self.call(self.manager.commit, self.plans[flight], given, accepted, refused=refused)
        if not refused:
            told = [part.early or new is not None for part, new in zip(flight.parts, late, strict=True)]
            self.model.commit(told, accepted)

    @precondition(lambda self: self.model.flights)
    @rule(data=DATA)
    def abort(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from(self.model.flights[::-1]), "flight")
        newest = all(self.model.flying(part.row)[-1] is flight for part in flight.parts if part.row.live)
        self.call(self.manager.abort, self.plans[flight], refused=None if newest else StepOrderError)
        if newest:
            self.device.drop(self.plans[flight])
            self.model.abort(flight)

    # Tiers --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows and ("host" in self.model.pools or len(self.model.rows) == 3))
    @rule(data=DATA, out=st.booleans(), at_once=st.booleans())
    def swap(self, data: st.DataObject, out: bool, at_once: bool) -> None:
        target = "host" if out else "device"
        verb = self.manager.swap_out if out else self.manager.swap_in
        rows = self.some(data, [row for row in self.idle() if row.tier != target], 4)
        if "host" not in self.model.pools:
            self.call(verb, self.named(rows), refused=InvalidInput)
            return
        refused: Refusal = self.busy(rows) or (WrongTier if any(row.tier == target for row in rows) else None)
        if not refused:
            missing, held = self.model.plan_move(rows, target)
            refused = self.out_of_blocks(target, len(missing), set(held.values()))
        transfer = self.call(verb, self.named(rows), refused=refused)
        if refused:
            return
        self.wait(rows)
        pairs = [pair for copies in transfer.copies for pair in copies.pairs.tolist()]
        assert transfer.num_copied == len(pairs) == len(dict(pairs))
        move = self.model.begin(rows, target, dict(pairs))
        assert [blocks.tolist() for blocks in transfer.moved] == move.moved
        self.transfers[move] = transfer
        self.device.poison(target, [block for _, block in pairs])
        if data.draw(st.booleans(), "copy now"):
            self.copied.add(move)
            self.device.move(transfer)
        if at_once:
            self.arrive(data, move)

    @precondition(lambda self: self.model.moves)
    @rule(data=DATA, ended_twice=st.booleans())
    def finish(self, data: st.DataObject, ended_twice: bool) -> None:
        move = data.draw(st.sampled_from(self.model.moves), "move")
        self.arrive(data, move)
        if ended_twice:
            self.call(self.manager.finish, self.transfers[move], refused=StepOrderError)
            self.call(self.manager.cancel, self.transfers[move], refused=StepOrderError)

    @precondition(lambda self: self.model.moves)
    @rule(data=DATA)
    def cancel(self, data: st.DataObject) -> None:
        move = data.draw(st.sampled_from(self.model.moves), "move")
        self.call(self.manager.cancel, self.transfers[move])
        self.model.cancel(move)

    # Pins ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def pin(self, data: st.DataObject) -> None:
        row = self.some(data, [row for row in self.ready() if row.known >= self.model.size], 1)[0]
        length = data.draw(st.integers(0, row.known), "length") + (not data.draw(LIKELY, "fits")) * self.limit
        wanted, pinned = length // self.model.size, sum(len(blocks) for blocks in self.model.pins)
        refused: Refusal = PinQuotaExceeded("me", wanted, pinned, 6) if pinned + wanted > 6 else None
        refused = InvalidInput if length > row.known else refused
        refused = SequenceBusy if row.moving else refused
        refused = WrongTier if row.tier == "host" else refused
        until = data.draw(st.sampled_from([None, 1.0, 2.0]), "until")
        pin = self.call(self.manager.pin, self.handles[row], "me", length, until, refused=refused)
        if not refused:
            assert pin.length == wanted * self.model.size
            held = contents(row.namespace, row.tokens[: pin.length])
            self.pins.append((pin, self.model.pin(row, length), held))

    @precondition(lambda self: self.pins)
    @rule(data=DATA, by_time=st.booleans())
    def unpin(self, data: st.DataObject, by_time: bool) -> None:
        ended = [one for one in self.pins if by_time and one[0].until == 1.0]
        if by_time:
            assert self.call(self.manager.expire, 1.5) == len(ended)
        else:
            ended = [data.draw(st.sampled_from(self.pins), "pin")]
            self.call(self.manager.unpin, ended[0][0])
        for one in ended:
            self.pins.remove(one)
            self.model.unpin(one[1])
            self.call(self.manager.unpin, one[0], refused=StalePin(one[0].number, "me"))

    @precondition(lambda self: self.model.count("device", "cached") > 3)
    @rule()
    def clear(self) -> None:
        assert self.call(self.manager.clear) == self.model.clear()

    # Refusals -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def call_wrongly(self, data: st.DataObject) -> None:
        """Calls that no state makes right."""
        calls = {"add": self.add_too_much}
        calls |= {"stale": self.use_a_stale_handle} if self.stale else {}
        calls |= {"commit": self.commit_wrongly} if self.plans else {}
        calls[data.draw(st.sampled_from(list(calls)), "call")](data)

    def add_too_much(self, data: st.DataObject) -> None:
        left, more = self.max_rows - len(self.model.rows), data.draw(st.integers(1, 2), "more")
        refused: Refusal = OutOfSequences(left + more, left, self.max_rows)
        prompts = [[0]] * (left + more)
        if data.draw(st.booleans(), "too long"):
            refused, prompts = SequenceTooLong(self.limit + more, self.limit), [[0] * (self.limit + more)]
        self.call(self.manager.add_many, prompts, refused=refused)

    def use_a_stale_handle(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.stale), "handle")
        both = [*self.named(self.model.rows[:1]), handle]
        manager = self.manager
        calls = (
            (manager.free, both),
            (manager.fork, handle),
            (manager.truncate, both, [0] * len(both)),
            (manager.reserve, both, [1] * len(both)),
            (manager.lengths, both),
            (manager.swap_out, both),
            (manager.swap_in, both),
        )
        self.call(*data.draw(st.sampled_from(calls), "call"), refused=StaleSequence(handle.row, handle.generation))

    def commit_wrongly(self, data: st.DataObject) -> None:
        wrong = data.draw(st.sampled_from(["order", "too many", "length", "twice", "negative"]), "wrong")
        others = [flight for flight in self.plans if flight not in self.model.flights[:1]][-6:]
        if others and (wrong == "order" or not self.model.flights):
            flight = data.draw(st.sampled_from(others), "flight")
            self.call(self.manager.commit, self.plans[flight], refused=StepOrderError)
            if flight not in self.model.flights:
                self.call(self.manager.abort, self.plans[flight], refused=StepOrderError)
        elif self.model.flights:
            flight = self.model.flights[0]
            late: list[list[int] | None] = [None] * len(flight.parts)
            alive = [i for i, part in enumerate(flight.parts) if part.row.live]
            if wrong in ("order", "too many") or not alive:
                late.append(None)
            else:
                i, new = alive[0], flight.parts[alive[0]].new
                twice = new if flight.parts[i].early else []
                late[i] = {"length": [*new, 0], "twice": twice, "negative": [-1] * len(new)}[wrong]
            self.call(self.manager.commit, self.plans[flight], late, refused=InvalidInput)


class CompiledMachine(Machine):
    """The same with the compiled loops, where there is a compiler."""

    compiled = True


TestManager, TestCompiledManager = Machine.TestCase, CompiledMachine.TestCase
TestManager.settings = TestCompiledManager.settings = settings(
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # machines are shared
)
