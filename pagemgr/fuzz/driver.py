"""Random calls beside the model: every verb, wrong calls included, several steps and transfers under way.

One layer group and no host cache: what is evicted is gone, so that the model can say all there is to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from random import Random
from typing import Any

from pagemgr.errors import InvalidInput, StaleSequence, StepOrderError
from pagemgr.eviction import names
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

from .pair import Event, Pair, Refusal, Sizes
from .state import Part, Row

_SPACES = (None, None, None, Namespace(tenant="x"), Namespace(adapter="x"))


class Driver:
    """One pair of manager and model, with a mind of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        debug = rng.choice((1, 1, 1, 1, 0, 2, 3))
        size = rng.choice((1, 2, 3, 4))
        num_blocks = rng.randint(8, 24)
        usable = (num_blocks - 1) * size
        self.pair = Pair(
            Sizes(
                num_blocks=num_blocks,
                block_size=size,
                max_sequences=rng.randint(4, 10),
                max_seq_len=rng.randint(min(3 * size + 3, usable), usable),
                num_host_blocks=rng.choice((0, 4, 8, 12, 12)),
                pin_quota=rng.choice((0, 3, 6)),
                prefix_caching=rng.random() < 0.9,
                eviction=rng.choice(("lru", *names())),
                debug=debug,
                compiled=rng.random() < 0.5,
            )
        )
        self.model, self.limits = self.pair.model, self.pair.sizes
        self.events: list[Event] = []
        self.stale: list[Sequence] = []
        self.ended: list[Pin] = []
        self.now = 0.0
        self.past: list[list[int]] = [[]]
        self.prompts: dict[Row, list[int]] = {}
        self.done: Counter[str] = Counter()

    @property
    def manager(self) -> BlockManager:
        """Who is called."""
        return self.pair.manager

    @property
    def sizes(self) -> dict[str, Any]:
        """What it was made with."""
        return asdict(self.limits)

    @property
    def refused(self) -> Counter[str]:
        """Calls that were refused as they had to be, by the error's name."""
        return self.pair.refused

    def act(self) -> str:
        """One call, wherever there is something to call for. Returns its name."""
        verbs = [self.add]
        if self.model.rows:
            verbs += [self.reserve, self.decode, self.decode, self.prefill, self.prefill, self.fork, self.truncate]
            verbs += [self.free, self.free, self.swap, self.wrong, self.pin, self.preempt]
        verbs += [self.commit, self.commit, self.commit, self.abort] if self.model.flights else []
        verbs += [self.finish, self.finish, self.cancel] if self.model.moves else []
        verbs += [self.let_pass] if self.events else []
        verbs += [self.unpin, self.expire] if self.pair.pins else []
        verbs += [self.clear] if self.rng.random() < 0.05 else []
        verb = self.rng.choice(verbs)
        self.done[verb.__name__] += 1
        verb()
        return verb.__name__

    def check(self) -> None:
        """Compare everything that can be seen."""
        self.pair.check()

    def end(self) -> None:
        """Bring everything to its end."""
        for event in self.events:
            event.passed = True
        self.pair.settle()
        for move in list(self.model.moves):
            self.pair.finish(move, None)
        while self.model.flights:
            self.pair.commit([True] * len(self.model.flights[0].parts))
        if self.model.rows:
            self.pair.free(list(self.model.rows), None)
        for pin in list(self.pair.pins):
            self.pair.unpin(pin)
        self.pair.check()

    # Sequences ----------------------------------------------------------------------------------------------------

    def add(self) -> None:
        """One or two, whose prompts often continue what was there before."""
        prompts = []
        for _ in range(self.rng.randint(1, 2)):
            past = self.rng.choice(self.past)
            keep = max(len(past) - self.rng.randint(0, self.limits.block_size), 0)
            prompts.append(past[:keep] + self._tokens(self.rng.randint(0, 2 * self.limits.block_size + 1)))
        if self._mostly():
            prompts = [prompt[: self.limits.max_seq_len] for prompt in prompts]
        rows = self.pair.add(prompts, [self.rng.choice(_SPACES) for _ in prompts])
        for row, prompt in zip(rows, prompts, strict=False):
            self.prompts[row] = prompt
            self._remember(prompt)

    def fork(self) -> None:
        """Children, rarely a number of them that cannot be."""
        row = self._some([row for row in self.model.rows if self._idle(row)], 1)[0]
        self.pair.fork(row, self.rng.choice((1, 1, 1, 2, 3)) if self._mostly() else 0)
        for child in self.model.rows:
            self.prompts.setdefault(child, self.prompts[row])

    def truncate(self) -> None:
        """A few tokens less, rarely more than there are."""
        rows = self._some([row for row in self.model.rows if self._idle(row) and row.tokens], 2)
        lengths = [max(row.computed - self.rng.randint(0, 2 * self.limits.block_size), 0) for row in rows]
        if not self._mostly():
            lengths[-1] = self.rng.choice((rows[-1].computed + 1, -1))
        self.pair.truncate(rows, lengths)

    def free(self) -> None:
        """Some end, behind a fence or not."""
        rows = self._some([row for row in self.model.rows if not row.moving], 3)
        self.stale = (self.stale + self.pair.free(rows, self._event()))[-4:]
        self._forget(rows)

    def let_pass(self) -> None:
        """A fence passes, between two looks at all of them: how often everything is compared must not decide when."""
        self.pair.settle()
        self.events.pop(self.rng.randrange(len(self.events))).passed = True
        self.pair.settle()

    # Steps --------------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """What is left of a prompt, committed at once if nothing is in flight."""
        row = self._some([row for row in self.model.rows if row.tier == "device" and not row.moving], 1)[0]
        rest = self.prompts[row][len(row.tokens) :] or self._tokens(1)
        self._step([self._part(row, rest)], at_once=self._mostly())

    def decode(self) -> None:
        """One token for all that can."""
        rows = [row for row in self.model.rows if row.tier == "device" and not row.moving] or self.model.rows
        self._step([self._part(row, self._tokens(1)) for row in rows], at_once=self.rng.random() < 0.5)

    def reserve(self) -> None:
        """Any batch of any counts."""
        rows = self._some([row for row in self.model.rows if row.tier == "device" and not row.moving], 4)
        most = 2 * self.limits.block_size + 1
        self._step([self._part(row, self._tokens(self.rng.randint(1, most))) for row in rows], at_once=False)

    def commit(self) -> None:
        """The oldest step."""
        parts = self.model.flights[0].parts
        accepted = [self.rng.randint(1, len(part.new)) for part in parts] if self.rng.random() < 0.2 else None
        self.pair.commit([self._mostly() for _ in parts], accepted)

    def abort(self) -> None:
        """Some step, as a rule the newest."""
        flights = self.model.flights
        self.pair.abort(flights[-1] if self._mostly() else self.rng.choice(flights))

    # Tiers --------------------------------------------------------------------------------------------------------

    def swap(self) -> None:
        """Begin to move some, as a rule of one tier."""
        source = self.rng.choice(self.model.rows).tier
        target = "device" if source == "host" else "host"
        rows = self._some([row for row in self.model.rows if self._idle(row) and row.tier == source], 4)
        self.pair.swap(rows, target)
        if self.model.moves and self.rng.random() < 0.5:
            self.finish()

    def finish(self) -> None:
        """A move ends well."""
        self.pair.finish(self.rng.choice(self.model.moves), self._event())

    def cancel(self) -> None:
        """A move is given up."""
        self.pair.cancel(self.rng.choice(self.model.moves))

    # Pins and room ------------------------------------------------------------------------------------------------

    def pin(self) -> None:
        """Some beginning of a row, rarely more than there is of it."""
        row = self._some([row for row in self.model.rows if row.tier == "device" and row.known], 1)[0]
        length = self.rng.randint(0, row.known) if self._mostly() else row.known + 1
        self.pair.pin(row, length, self.rng.choice((None, self.now + 1, self.now + 3)))

    def unpin(self) -> None:
        """A pin ends, rarely one that has ended before."""
        if self.ended and not self._mostly():
            self.pair.unpin(self.rng.choice(self.ended))
            return
        self.ended = [*self.ended, self.rng.choice(list(self.pair.pins))][-4:]
        self.pair.unpin(self.ended[-1])

    def expire(self) -> None:
        """Time goes on."""
        self.now += self.rng.choice((0, 1, 1))
        self.ended = [*self.ended, *self.pair.expire(self.now)][-4:]

    def clear(self) -> None:
        """Nothing stays cached."""
        self.pair.clear()

    def preempt(self) -> None:
        """Others have to go so that a few rows can go on."""
        ready = [row for row in self.model.rows if row.tier == "device" and not row.moving]
        if ready:
            rows = self.rng.sample(ready, self.rng.randint(1, min(2, len(ready))))
            others = [row for row in self.model.rows if row not in rows]
            most = max(self.limits.max_seq_len - len(max(rows, key=lambda row: len(row.tokens)).tokens), 1)
            parts = [self._part(row, self._tokens(self.rng.randint(1, most))) for row in rows]
            self.pair.preempt(parts, self.rng.sample(others, len(others)))
            self._forget(others)
            self._step(parts, at_once=True)

    # Wrong calls --------------------------------------------------------------------------------------------------

    def wrong(self) -> None:
        """A call that no state makes right."""
        pair, manager, row = self.pair, self.pair.manager, self.rng.choice(self.model.rows)
        mine = pair.handles[row]
        calls: list[tuple[Callable[..., object], tuple[object, ...], Refusal]] = [
            (manager.free, ([mine, mine],), InvalidInput),
            (manager.free, ([mine], 1), InvalidInput),
            (manager.add_many, ([[-1]],), InvalidInput),
            (manager.add_many, ([[0]], []), InvalidInput),
            (manager.reserve, ([mine], [0]), InvalidInput),
            (manager.reserve, ([mine], [[1], [2]]), InvalidInput),
        ]
        for handle in self.stale[-1:]:
            both, stale = [mine, handle], StaleSequence(handle.row, handle.generation)
            calls += [(verb, (both,), stale) for verb in (manager.free, manager.lengths)]
            calls += [(manager.reserve, (both, [1, 1]), stale), (manager.fork, (handle,), stale)]
            calls += [(manager.truncate, (both, [0, 0]), stale), (manager.swap_out, (both,), stale)]
        for flight in self.model.flights[1:2]:
            calls += [(manager.commit, (pair.plans[flight],), StepOrderError)]
        for flight in self.model.flights[:1]:
            calls += [(manager.commit, (pair.plans[flight], [None] * (len(flight.parts) + 1)), InvalidInput)]
        verb, args, refused = self.rng.choice(calls)
        pair.call(verb, *args, refused=refused)

    # Drawing ------------------------------------------------------------------------------------------------------

    def _step(self, parts: list[Part], at_once: bool) -> None:
        self.pair.reserve(parts)
        if at_once and len(self.model.flights) == 1:
            self.commit()

    def _part(self, row: Row, new: list[int]) -> Part:
        return Part(row, len(row.tokens), new, self.rng.random() < 0.5, None)

    def _tokens(self, count: int) -> list[int]:
        """Of two values, so that prefixes often agree."""
        bits = self.rng.getrandbits(3)
        return [bits >> at % 3 & 1 for at in range(count)]

    def _some(self, fitting: list[Row], most: int) -> list[Row]:
        """A few rows in any order, as a rule of those that fit."""
        rows = fitting if fitting and self._mostly() else self.model.rows
        return self.rng.sample(rows, self.rng.randint(1, min(most, len(rows))))

    def _event(self) -> Event | None:
        """No fence, a new one, or one that others wait for."""
        kind = self.rng.randrange(3)
        if kind == 0:
            return None
        if kind == 1 or not self.events:
            self.events.append(Event())
        return self.events[-1]

    def _idle(self, row: Row) -> bool:
        return not row.moving and not self.model.flying(row)

    def _forget(self, rows: list[Row]) -> None:
        for row in rows:
            if not row.live:
                self._remember(row.tokens[: row.computed])
                del self.prompts[row]

    def _remember(self, tokens: list[int]) -> None:
        self.past = [*self.past, tokens][-5:]

    def _mostly(self) -> bool:
        return self.rng.random() < 0.9
