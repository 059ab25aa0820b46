"""Random calls judged by what sequences read: layer groups, both host caches, drafts, pins, moves of all kinds.

No model says which block goes where. Before a step writes, each of its sequences must find what its layers see, and
afterwards as well. Steps run any time before they are committed, and what moves is copied any time before its move is
finished. Whoever was promised that blocks stay as they are until a fence passes finds them so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

from pagemgr.assembly import HOST, HOST_CACHES
from pagemgr.errors import InvalidInput, OperatingError
from pagemgr.eviction import names
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.plan import Promotion, Transfer
from pagemgr.prefix import Namespace

from .contents import Contents, Flight, Move, Place, Stream
from .listener import Listener
from .pair import Event

SPACES = (Namespace(), Namespace(tenant="x"), Namespace(adapter="x"))
WINDOWS = ((None,), (None, 5, 5), (3,), (None, 7, None, 2))


def drawn(rng: Random) -> dict[str, Any]:
    """What a manager is made with."""
    windows = rng.choice(WINDOWS)
    groups, size, columns = len(windows), rng.choice((1, 2, 2, 3, 4)), rng.randint(10, 18)
    return {
        "num_blocks": 1 + columns * groups,
        "block_size": size,
        "max_sequences": rng.randint(3, 7),
        "max_seq_len": columns * size - rng.randint(0, size - 1),
        "num_host_blocks": 1 + rng.randint(3, 14) * groups,
        "host_cache": rng.choice(HOST_CACHES),
        "windows": windows,
        "rollback": rng.choice((0, 1, 4)),
        "watermark": rng.choice((0, 0, 3)),
        "pin_quota": rng.choice((0, 3, 6)) * groups,
        "verify_hits": rng.random() < 0.5,
        "eviction": rng.choice(("lru", *names())),
        "debug": rng.choice((1, 1, 1, 1, 0, 2, 3)),
        "compiled": rng.random() < 0.5,
    }


class Engine:
    """Calls one manager and keeps the bytes. ``sizes`` are drawn from the seed unless given."""

    def __init__(self, seed: int, **sizes: Any) -> None:
        self.rng = Random(seed)
        self.sizes = drawn(self.rng) | sizes
        self.manager = BlockManager(**self.sizes)
        self.listeners = [Listener(self.manager)] if self.rng.random() < 0.8 else []
        self.contents = Contents(self.manager)
        self.streams: list[Stream] = []
        self.flights: list[Flight] = []
        self.moves: list[Move] = []
        self.pins: dict[Pin, dict[Place, list[Any]]] = {}
        self.readers: dict[Event, dict[Place, list[Any]]] = {}
        self.past: list[tuple[Namespace, list[int]]] = [(SPACES[0], [])]
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.now = 0.0
        self.checks = 0

    def act(self) -> str:
        """One call. What is refused for want of room is left alone."""
        verbs = [self.add] * 4 + [self.step] * 4 + [self.free] * 4
        verbs += [self.swap, self.swap, self.truncate, self.pin, self.preempt, self.fork]
        verbs += [self.run, self.commit, self.commit, self.commit, self.drafts, self.abort] if self.flights else []
        verbs += [self.copy_now, self.finish, self.finish, self.cancel] if self.moves else []
        verbs += [self.unpin, self.unpin, self.expire] if self.pins else []
        verbs += [self.let_pass] if self.readers else []
        verbs += [self.clear] if self.rng.random() < 0.1 else []
        verb = self.rng.choice(verbs)
        try:
            self.done[verb.__name__] += 1
            verb()
        except OperatingError as error:
            self.refused[type(error).__name__] += 1
        return verb.__name__

    def check(self) -> None:
        """Everybody finds what is theirs, and listeners know what there is."""
        self.manager.check()
        for stream in self.streams:
            self._sees(stream)
        for held in (*self.pins.values(), *self.readers.values()):
            assert self.contents.of(held) == held, "blocks were written that somebody still reads"
        for listener in self.listeners:
            listener.check()
        self.checks += 1
        if self.listeners and self.checks % 20 == 0:
            self.listeners.append(Listener(self.manager))
            if len(self.listeners) > 2:
                self.listeners.pop(0).leave()

    def end(self) -> None:
        """Bring everything to its end."""
        while self.moves:
            self.finish()
        while self.flights:
            self.commit()
        while self.readers:
            self.let_pass()
        self.check()
        for stream in list(self.streams):
            self._free([stream], None)
        for pin in list(self.pins):
            self.manager.unpin(pin)

    # Sequences ----------------------------------------------------------------------------------------------------

    def add(self) -> None:
        """Two of one prompt, perhaps in two namespaces, which often continue what was there before."""
        space, begun = self.rng.choice(self.past)
        keep = len(begun) if self.rng.random() < 0.6 else self.rng.randint(0, len(begun))
        prompt = (begun[:keep] + self._tokens(6))[: self.manager.max_seq_len]
        spaces = [space, self.rng.choice(SPACES)]
        self.manager.stats()  # lets go of what waited for fences that have passed, as a verb does and match does not
        expected = [self.manager.match(prompt, each) for each in spaces]
        handles, promotion = self.manager.admit([prompt, prompt], spaces)
        found = [(handle, space, handle.num_cached_tokens) for handle, space in zip(handles, spaces, strict=True)]
        streams = [Stream(handle, space, prompt[:length], length, length) for handle, space, length in found]
        for stream, (device, both) in zip(streams, expected, strict=True):
            assert len(stream.tokens) == (device if promotion is None else both)
        self.streams += streams
        if promotion is not None:
            self._begin(promotion, streams)
        for stream in streams:
            self._sees(stream)

    def fork(self) -> None:
        """Two children."""
        for stream in self._idle()[:1]:
            for handle in self.manager.fork(stream.handle, 2):
                self.streams.append(replace(stream, handle=handle, tokens=list(stream.tokens)))

    def truncate(self) -> None:
        """A few tokens less, if the windows can go on from there."""
        for stream in self._idle()[:1]:
            length = max(len(stream.tokens) - self.rng.randint(0, 4), 0)
            try:
                self.manager.truncate([stream.handle], [length])
            except InvalidInput:
                assert any(self.manager.table.windows)
                assert length < max(stream.longest - self.manager.rollback, stream.begun)
                self.done["left the window"] += 1
                return
            del stream.tokens[length:]
            self._sees(stream)

    def free(self) -> None:
        """Some end, behind a fence or not."""
        gone = self._shuffled([stream for stream in self.streams if not stream.moving])[:3]
        if gone:
            self._free(gone, self._event())

    def _free(self, gone: list[Stream], after: Event | None) -> None:
        if after is not None:
            still = [stream for stream in gone if not stream.flying]
            self._reads([place for stream in still for place in self.contents.held(stream)], after)
        self.manager.free([stream.handle for stream in gone], after)
        self.past = [*self.past, *((stream.space, stream.tokens) for stream in gone)][-12:]
        self.streams = [stream for stream in self.streams if stream not in gone]
        for stream in gone:
            stream.live = False

    def let_pass(self) -> None:
        """A fence passes."""
        event = self.rng.choice(list(self.readers))
        held = self.readers.pop(event)
        assert self.contents.of(held) == held
        event.passed = True

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Up to five sequences on the device, with ids now, at commit, or never."""
        streams = self._on("device", self._shuffled([s for s in self.streams if not s.moving]))[:5]
        if streams:
            self._reserve(streams, [self._tokens(5) for _ in streams])

    def _reserve(self, streams: list[Stream], new: list[list[int]]) -> None:
        told = self.rng.choice(("now", "now", "late", "late", "never" if self.rng.random() < 0.1 else "now"))
        given = new if told == "now" else [len(tokens) for tokens in new]
        plan = self.manager.reserve([stream.handle for stream in streams], given)
        histories = [list(stream.tokens) for stream in streams]
        self.flights.append(Flight(plan, streams, histories, new, new if told == "late" else []))
        for stream, tokens in zip(streams, new, strict=True):
            stream.tokens = stream.tokens + tokens
            stream.flying += 1
        if self.rng.random() < 0.6:
            self.run()

    def run(self) -> None:
        """All steps so far run."""
        for flight in self.flights:
            if not flight.ran:
                self.contents.run(flight)

    def commit(self) -> None:
        """The oldest step."""
        self._commit(None)

    def drafts(self) -> None:
        """The oldest step, of which not all tokens count."""
        flight = self.flights[0]
        if all(stream.flying == 1 for stream in flight.streams if stream.live):
            self._commit([self.rng.randint(1, len(tokens)) for tokens in flight.new])

    def _commit(self, accepted: list[int] | None) -> None:
        flight = self.flights[0]
        if not flight.ran:
            self.contents.run(flight)
        self.manager.commit(flight.plan, flight.late or None, accepted)
        del self.flights[0]
        for i, (stream, new) in enumerate(zip(flight.streams, flight.new, strict=True)):
            stream.flying -= 1
            if stream.live:
                if accepted is not None and accepted[i] < len(new):
                    del stream.tokens[len(stream.tokens) - len(new) + accepted[i] :]
                kept = len(flight.histories[i]) + (len(new) if accepted is None else accepted[i])
                stream.longest = max(stream.longest, kept)
                self._sees(stream)

    def abort(self) -> None:
        """The newest step."""
        flight = self.flights.pop()
        self.manager.abort(flight.plan)
        for stream, new in zip(flight.streams, flight.new, strict=True):
            stream.flying -= 1
            if stream.live:
                del stream.tokens[len(stream.tokens) - len(new) :]
                self._sees(stream)

    # Tiers --------------------------------------------------------------------------------------------------------

    def swap(self) -> None:
        """Begin to move two of one tier to the other."""
        tier = self.rng.choice(("device", "host"))
        streams = self._on(tier, self._idle())[:2]
        verb = self.manager.swap_in if tier == "host" else self.manager.swap_out
        if streams:
            self._begin(verb([stream.handle for stream in streams]), streams)

    def _begin(self, what: Transfer | Promotion, streams: list[Stream]) -> None:
        for stream in streams:
            stream.moving = True
        self.moves.append(Move(what, streams))
        if self.rng.random() < 0.5:
            self.copy_now()

    def copy_now(self) -> None:
        """The copies of the newest move, well before it is finished."""
        move = self.moves[-1]
        if not move.copied:
            self.contents.copy(move.what.copies)
            move.copied = True

    def finish(self) -> None:
        """A move ends well."""
        move = self.moves.pop(self.rng.randrange(len(self.moves)))
        if not move.copied:
            self.contents.copy(move.what.copies)
        after = self._event()
        if after is not None:
            copies = move.what.copies[-1:]
            self._reads([(group.source, block) for group in copies for block in group.pairs[:, 0].tolist()], after)
        self.manager.finish(move.what, after)
        if isinstance(move.what, Promotion) and self.sizes["host_cache"] == "exclusive":
            host = self.manager.tiers[HOST].pool
            left = move.what.blocks[host.published[move.what.blocks] & (host.refs[move.what.blocks] == 0)]
            assert not len(left), f"host blocks {left} came up and can be found below as well"
        for stream in move.streams:
            stream.moving = False
            self._sees(stream)

    def cancel(self) -> None:
        """A move comes to nothing: who was swapped stays, who was admitted ends."""
        move = self.moves.pop(self.rng.randrange(len(self.moves)))
        self.manager.cancel(move.what)
        for stream in move.streams:
            stream.moving, stream.live = False, isinstance(move.what, Transfer)
            if stream.live:
                self._sees(stream)
        self.streams = [stream for stream in self.streams if stream.live]

    def clear(self) -> None:
        """Nothing stays cached."""
        cached = sum(tier.cached for tier in self.manager.stats().tiers)
        assert self.manager.clear() == cached

    # Pins and room ------------------------------------------------------------------------------------------------

    def pin(self) -> None:
        """All that is known of a sequence stays."""
        for stream in self._on("device", self._idle())[:1]:
            pin = self.manager.pin(stream.handle, "me", until=self.rng.choice((None, self.now + 1, self.now + 3)))
            self.pins[pin] = self.contents.of(("device", block) for block in pin.blocks.tolist())

    def unpin(self) -> None:
        """A pin ends."""
        pin = self.rng.choice(list(self.pins))
        self.manager.unpin(pin)
        del self.pins[pin]

    def expire(self) -> None:
        """Time goes on, and pins with it."""
        self.now += 1
        ended = [pin for pin in self.pins if pin.until is not None and pin.until <= self.now]
        assert self.manager.expire(self.now) == len(ended)
        for pin in ended:
            del self.pins[pin]

    def preempt(self) -> None:
        """Others go as the manager says, so that one can go on; where nothing has to be waited for, it can."""
        for stream in self._on("device", self._idle())[:1]:
            new = self._tokens(3 * self.manager.block_size)
            before = self.manager.stats()
            others = [other.handle for other in self._shuffled(self.streams) if other is not stream]
            plan = self.manager.preemption([stream.handle], [len(new)], others)
            assert self.manager.stats() == before
            if plan.swap_out:
                gone = [other for other in self.streams if other.handle in plan.swap_out]
                self._begin(self.manager.swap_out(list(plan.swap_out)), gone)
                self.finish()
            self._free([other for other in self.streams if other.handle in plan.drop], None)
            waiting = self.flights or self.moves or self.readers or plan.missing
            if not waiting and len(stream.tokens) + len(new) <= self.manager.max_seq_len:
                refused = self.refused["OutOfBlocks"]
                self._reserve([stream], [new])
                assert self.refused["OutOfBlocks"] == refused

    # Reading ------------------------------------------------------------------------------------------------------

    def _sees(self, stream: Stream) -> None:
        """The stream finds what is its own, unless that is not written yet."""
        unwritten = [flight.streams for flight in self.flights if not flight.ran]
        unwritten += [move.streams for move in self.moves if isinstance(move.what, Promotion) and not move.copied]
        if not any(stream in streams for streams in unwritten):
            self.contents.seen(stream)

    def _reads(self, places: list[Place], until: Event) -> None:
        """Somebody reads these blocks until an event passes."""
        self.readers.setdefault(until, {}).update(self.contents.of(places))

    # Drawing ------------------------------------------------------------------------------------------------------

    def _tokens(self, most: int) -> list[int]:
        """Of two values, so that prefixes often agree."""
        bits = self.rng.getrandbits(5)
        return [bits >> at % 5 & 1 for at in range(self.rng.randint(1, most))]

    def _shuffled(self, streams: list[Stream]) -> list[Stream]:
        return self.rng.sample(streams, len(streams))

    def _idle(self) -> list[Stream]:
        return self._shuffled([stream for stream in self.streams if not stream.flying and not stream.moving])

    def _on(self, tier: str, streams: list[Stream]) -> list[Stream]:
        return [stream for stream in streams if self.contents.tier(stream) == tier]

    def _event(self) -> Event | None:
        """No fence, a new one, or one that others wait for."""
        return self.rng.choice((None, None, Event(), *list(self.readers)[-1:]))
