"""Every verb of the manager in random order, several steps and transfers under way, against a model and in bytes."""

from __future__ import annotations

from device import contents
from harness import NAMESPACES, Harness
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from pagemgr.errors import InvalidInput, StaleSequence, StepOrderError
from pagemgr.fuzz.state import Part

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
        for row in self.add_rows(prompts, spaces):
            rest = self.prompts[row][len(row.tokens) :]
            if run and rest:
                self.step_of([Part(row, len(row.tokens), rest, True, None)], True)

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA, n=st.sampled_from([1, 2, 3, 0]))
    def fork(self, data: st.DataObject, n: int) -> None:
        row = self.some(data, [row for row in self.idle() if row.tokens], 1)[0]
        left = self.max_rows - len(self.model.rows)
        self.pair.fork(row, min(n, max(left, 1)) if data.draw(LIKELY, "fits") else n)
        for child in self.model.rows:
            self.prompts.setdefault(child, self.prompts[row])

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def truncate(self, data: st.DataObject) -> None:
        rows = self.some(data, [row for row in self.idle() if row.tokens], 2)
        lengths = [max(row.computed - data.draw(st.integers(0, 2 * self.model.size), "cut"), 0) for row in rows]
        if not data.draw(LIKELY, "fits"):
            lengths[-1] = data.draw(st.sampled_from([rows[-1].computed + 1, -1]), "length")
        self.wait(rows)
        self.pair.truncate(rows, lengths)

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def free(self, data: st.DataObject) -> None:
        rows = self.some(data, [row for row in self.model.rows if not row.moving], 3)
        after = self.event(data)
        self.wait(rows)
        if not any(row.moving for row in rows):
            self.promise(rows, after)
            self.past = [*self.past, *(row.tokens[: row.computed] for row in rows)][-5:]
        self.stale = (self.stale + self.pair.free(rows, after))[-4:]

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
        self.pair.truncate([row], [length])
        self.step_of([Part(row, length, self.tokens(data, cut), data.draw(LIKELY, "early"), None)], at_once)

    @precondition(lambda self: self.model.count("device", "cached") and len(self.model.rows) < self.max_rows)
    @rule(data=DATA)
    def squeeze(self, data: st.DataObject) -> None:
        """A sequence comes and goes for which blocks must be evicted."""
        count = self.model.count("device", "free") + data.draw(st.integers(1, 4), "evicted")
        (row,) = self.add_rows([[]], [None])
        self.step_of([Part(row, 0, self.tokens(data, min(count * self.model.size, self.limit)), False, None)], True)
        self.pair.free([row], None)

    @precondition(lambda self: self.device.launched)
    @rule()
    def run_a_step(self) -> None:
        self.device.run_through(self.device.launched[0].plan.step)

    @precondition(lambda self: self.model.flights)
    @rule(data=DATA)
    def commit(self, data: st.DataObject) -> None:
        """The oldest; drafts that are refused are rolled back."""
        parts = self.model.flights[0].parts
        accepted = None
        if not data.draw(LIKELY, "all accepted"):
            accepted = [data.draw(st.integers(1, len(part.new)), "accepted") for part in parts]
        self.end_step([data.draw(LIKELY, "told") for _ in parts], accepted)

    @precondition(lambda self: self.model.flights)
    @rule(data=DATA)
    def abort(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from(self.model.flights[::-1]), "flight")
        plan = self.pair.plans[flight]
        if self.pair.abort(flight):
            self.device.drop(plan)
            self.ended = [*self.ended, plan][-4:]

    # Tiers --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows and ("host" in self.model.pools or len(self.model.rows) == 3))
    @rule(data=DATA, out=st.booleans(), at_once=st.booleans())
    def swap(self, data: st.DataObject, out: bool, at_once: bool) -> None:
        target = "host" if out else "device"
        rows = self.some(data, [row for row in self.idle() if row.tier != target], 4)
        move = self.pair.swap(rows, target)
        if move is None:
            return
        self.wait(rows)
        self.device.poison(target, list(move.pairs.values()))
        if data.draw(st.booleans(), "copy now"):
            self.copied.add(move)
            self.device.move(self.pair.transfers[move])
        if at_once:
            self.arrive(data, move)

    @precondition(lambda self: self.model.moves)
    @rule(data=DATA, ended_twice=st.booleans())
    def finish(self, data: st.DataObject, ended_twice: bool) -> None:
        move = data.draw(st.sampled_from(self.model.moves), "move")
        transfer = self.pair.transfers[move]
        self.arrive(data, move)
        if ended_twice:
            self.pair.call(self.manager.finish, transfer, refused=StepOrderError)
            self.pair.call(self.manager.cancel, transfer, refused=StepOrderError)

    @precondition(lambda self: self.model.moves)
    @rule(data=DATA)
    def cancel(self, data: st.DataObject) -> None:
        self.pair.cancel(data.draw(st.sampled_from(self.model.moves), "move"))

    # Pins ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def pin(self, data: st.DataObject) -> None:
        row = self.some(data, [row for row in self.ready() if row.known >= self.model.size], 1)[0]
        length = data.draw(st.integers(0, row.known), "length") + (not data.draw(LIKELY, "fits")) * self.limit
        self.pair.pin(row, length, data.draw(st.sampled_from([None, 1.0, 2.0]), "until"))
        for pin in self.pair.pins.keys() - self.pinned.keys():
            self.pinned[pin] = contents(row.namespace, row.tokens[: pin.length])

    @precondition(lambda self: self.pinned)
    @rule(data=DATA, by_time=st.booleans())
    def unpin(self, data: st.DataObject, by_time: bool) -> None:
        if by_time:
            ended = self.pair.expire(1.5)
        else:
            ended = [data.draw(st.sampled_from(list(self.pinned)), "pin")]
            self.pair.unpin(ended[0])
        for pin in ended:
            del self.pinned[pin]
            self.pair.unpin(pin)

    @precondition(lambda self: self.model.count("device", "cached") > 3)
    @rule()
    def clear(self) -> None:
        self.pair.clear()

    # Refusals -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.rows)
    @rule(data=DATA)
    def call_wrongly(self, data: st.DataObject) -> None:
        """Calls that no state makes right."""
        calls = {"add": self.add_too_much}
        calls |= {"stale": self.use_a_stale_handle} if self.stale else {}
        calls |= {"commit": self.commit_wrongly} if self.model.flights or self.ended else {}
        calls[data.draw(st.sampled_from(list(calls)), "call")](data)

    def add_too_much(self, data: st.DataObject) -> None:
        more = data.draw(st.integers(1, 2), "more")
        prompts = [[0]] * (self.max_rows - len(self.model.rows) + more)
        if data.draw(st.booleans(), "too long"):
            prompts = [[0] * (self.limit + more)]
        assert not self.pair.add(prompts, [None] * len(prompts))

    def use_a_stale_handle(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.stale), "handle")
        both = [*(self.pair.handles[row] for row in self.model.rows[:1]), handle]
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
        refused = StaleSequence(handle.row, handle.generation)
        self.pair.call(*data.draw(st.sampled_from(calls), "call"), refused=refused)

    def commit_wrongly(self, data: st.DataObject) -> None:
        wrong = data.draw(st.sampled_from(["order", "too many", "length", "twice", "negative"]), "wrong")
        others = [*self.ended, *(self.pair.plans[flight] for flight in self.model.flights[1:])]
        if others and (wrong == "order" or not self.model.flights):
            plan = data.draw(st.sampled_from(others), "plan")
            self.pair.call(self.manager.commit, plan, refused=StepOrderError)
            if plan in self.ended:
                self.pair.call(self.manager.abort, plan, refused=StepOrderError)
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
            self.pair.call(self.manager.commit, self.pair.plans[flight], late, refused=InvalidInput)


class CompiledMachine(Machine):
    """The same with the compiled loops, where there is a compiler."""

    compiled = True


TestManager, TestCompiledManager = Machine.TestCase, CompiledMachine.TestCase
TestManager.settings = TestCompiledManager.settings = settings(
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # machines are shared
)
