"""Layer groups, both host caches, drafts, pins and transfers in random order, judged by what is read and nothing else.

No model says which block goes where. A slot holds what its K and V depend on: the layer group, the namespace and every
token up to its own. Before a step writes, each of its sequences must find what its layers see; afterwards as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from listener import Listener

from pagemgr.errors import OperatingError, UsageError
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.plan import Copies, Plan
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

EVERY = ("add", "step", "end", "drafts", "abort", "fork", "free", "swap", "pin", "unpin", "truncate", "OutOfBlocks")
SPACES = (Namespace(), Namespace(tenant="x"), Namespace(adapter="x"))


@dataclass(eq=False)
class Stream:
    """A sequence as its engine knows it."""

    handle: Sequence
    space: Namespace
    tokens: list[int]
    flying: int = 0


@dataclass
class Engine:
    """Calls one manager and keeps the bytes."""

    manager: BlockManager
    rng: np.random.Generator
    slots: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    flights: list[tuple[Plan, list[Stream], list[list[int]], list[list[int]]]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    past: list[tuple[Namespace, list[int]]] = field(default_factory=list)

    def draw(self, most: int) -> list[int]:
        return self.rng.integers(0, 2, self.rng.integers(1, most + 1)).tolist()

    def idle(self) -> list[Stream]:
        streams = [stream for stream in self.streams if not stream.flying]
        return [streams[i] for i in self.rng.permutation(len(streams))]

    def on(self, tier: int, streams: list[Stream]) -> list[Stream]:
        return [stream for stream in streams if self.manager.table.tier[stream.handle.row] == tier]

    # Bytes --------------------------------------------------------------------------------------------------------

    def copy(self, copies: tuple[Copies, ...]) -> None:
        for group in copies:
            for source, target in group.pairs.tolist():
                self.slots[group.target, target] = list(self.slots[group.source, source])

    def sees(self, stream: Stream, length: int) -> None:
        """The stream finds everything that its next token reads, in every group."""
        manager, size = self.manager, self.manager.block_size
        for group, window in enumerate(manager.table.windows):
            row = stream.handle.row + group * manager.table.max_sequences
            tier = manager.tiers[manager.table.tier[row]].name
            for at in range(0 if window is None else max(length - window + 1, 0), length):
                block = int(manager.table.blocks[row, at // size])
                held = self.slots[tier, block][at % size]
                assert held == (group, stream.space, tuple(stream.tokens[: at + 1])), (group, at, held)

    def write(self, plan: Plan, streams: list[Stream], new: list[list[int]]) -> None:
        size, count = self.manager.block_size, plan.num_tokens
        for group in range(plan.num_groups):
            slots = iter(plan.slot_mapping[group * count : (group + 1) * count].tolist())
            for stream, start, tokens in zip(streams, plan.starts.tolist(), new, strict=False):
                history = stream.tokens[:start] + tokens
                for at in range(start, start + len(tokens)):
                    slot = next(slots)
                    self.slots.setdefault(("device", slot // size), [None] * size)
                    self.slots["device", slot // size][slot % size] = (group, stream.space, tuple(history[: at + 1]))

    # Calls --------------------------------------------------------------------------------------------------------

    def act(self) -> None:
        verbs = [self.add, self.add, self.step, self.step, self.step, self.step, self.end, self.end, self.drafts]
        verbs += [
            self.fork,
            self.truncate,
            self.free,
            self.free,
            self.swap,
            self.swap,
            self.pin,
            self.unpin,
            self.abort,
        ]
        verb = verbs[self.rng.integers(len(verbs))]
        try:
            self.done[verb.__name__] += bool(verb())
        except OperatingError as error:
            self.done[type(error).__name__] += 1

    def add(self) -> bool:
        space, begun = self.past[self.rng.integers(len(self.past))] if self.past else (SPACES[0], [])
        prompt = begun[: self.rng.integers(0, len(begun) + 1)] + self.draw(6)
        spaces = [space, SPACES[self.rng.integers(3)]]
        handles, promotion = self.manager.admit([prompt, prompt], spaces)
        if promotion is not None:
            self.manager.check()
            if self.rng.integers(3) == 0:
                self.manager.cancel(promotion)
                self.done["cancelled promotion"] += 1
                return False
            self.copy(promotion.copies)
            self.manager.finish(promotion)
            self.done["promotion"] += 1
        for handle, each in zip(handles, spaces, strict=True):
            stream = Stream(handle, each, prompt[: handle.num_cached_tokens])
            self.streams.append(stream)
            self.sees(stream, len(stream.tokens))
        return True

    def step(self) -> bool:
        streams = self.on(0, self.streams)[-5:]
        new = [self.draw(5) for _ in streams]
        if not streams:
            return False
        late = self.rng.integers(2) == 1
        plan = self.manager.reserve([s.handle for s in streams], [len(t) for t in new] if late else new)
        self.copy(plan.copies)
        for stream in streams:
            self.sees(stream, len(stream.tokens))
        self.write(plan, streams, new)
        for stream, tokens in zip(streams, new, strict=True):
            stream.tokens += tokens
            stream.flying += 1
            self.sees(stream, len(stream.tokens))
        self.flights.append((plan, streams, new, new if late else []))
        return True

    def end(self, accepted: list[int] | None = None) -> bool:
        if not self.flights:
            return False
        plan, streams, new, late = self.flights[0]
        self.manager.commit(plan, late or None, accepted)
        self.flights.pop(0)
        for i, (stream, tokens) in enumerate(zip(streams, new, strict=True)):
            stream.flying -= 1
            if accepted is not None and stream in self.streams and accepted[i] < len(tokens):
                del stream.tokens[len(stream.tokens) - len(tokens) + accepted[i] :]
            if stream in self.streams:
                self.sees(stream, len(stream.tokens))
        return True

    def drafts(self) -> bool:
        if not self.flights or any(stream.flying > 1 for stream in self.flights[0][1]):
            return False
        return self.end([int(self.rng.integers(1, len(tokens) + 1)) for tokens in self.flights[0][2]])

    def abort(self) -> bool:
        if not self.flights:
            return False
        plan, streams, new, _ = self.flights.pop()
        self.manager.abort(plan)
        for stream, tokens in zip(streams, new, strict=True):
            stream.flying -= 1
            del stream.tokens[len(stream.tokens) - len(tokens) :]
            if stream in self.streams:
                self.sees(stream, len(stream.tokens))
        return True

    def fork(self) -> bool:
        for stream in self.idle()[:1]:
            for handle in self.manager.fork(stream.handle, 2):
                self.streams.append(Stream(handle, stream.space, list(stream.tokens)))
        return True

    def truncate(self) -> bool:
        for stream in self.idle()[:1]:
            length = max(len(stream.tokens) - int(self.rng.integers(0, 5)), 0)
            try:
                self.manager.truncate([stream.handle], [length])
            except UsageError:
                assert any(self.manager.table.windows)
                self.done["left the window"] += 1
                return False
            del stream.tokens[length:]
            self.sees(stream, length)
        return True

    def free(self) -> bool:
        gone = [self.streams[i] for i in self.rng.permutation(len(self.streams))[:3]]
        self.manager.free([stream.handle for stream in gone])
        self.past = [*self.past, *((stream.space, stream.tokens) for stream in gone)][-6:]
        self.streams = [stream for stream in self.streams if stream not in gone]
        return bool(gone)

    def swap(self) -> bool:
        tier = int(self.rng.integers(2))
        moving = self.on(tier, self.idle())[:2]
        verb = self.manager.swap_in if tier else self.manager.swap_out
        transfer = verb([stream.handle for stream in moving])
        self.manager.check()
        if self.rng.integers(5) == 0:
            self.manager.cancel(transfer)
        else:
            self.copy(transfer.copies)
            self.manager.finish(transfer)
        for stream in moving:
            self.sees(stream, len(stream.tokens))
        return bool(moving)

    def pin(self) -> bool:
        for stream in self.on(0, self.idle())[:1]:
            self.pins.append(self.manager.pin(stream.handle, "me"))
        return True

    def unpin(self) -> bool:
        if self.pins:
            self.manager.unpin(self.pins.pop(self.rng.integers(len(self.pins))))
        return True


def run(windows: tuple[int | None, ...], host_cache: str, compiled: bool, seed: int = 0, calls: int = 600) -> Engine:
    groups = len(windows)
    manager = BlockManager(
        1 + 16 * groups,
        2,
        max_sequences=9,
        max_seq_len=30,
        num_host_blocks=1 + 12 * groups,
        host_cache=host_cache,
        windows=windows,
        rollback=1,
        pin_quota=6 * groups,
        verify_hits=True,
        compiled=compiled,
    )
    engine = Engine(manager, np.random.default_rng([groups, len(host_cache), seed]))
    listeners = [Listener(manager)]
    for call in range(calls):
        engine.act()
        manager.check()
        if call % 50 == 0:
            listeners.append(Listener(manager))
        for listener in listeners[-2:]:
            listener.check()
        engine.done["dropped"] += int(manager.table.dropped.any())
    return engine


@pytest.mark.parametrize("host_cache", ["off", "inclusive", "exclusive"])
@pytest.mark.parametrize("windows", [(None,), (None, 5, 5), (3,), (None, 7, None, 2)], ids=str)
def test_every_sequence_finds_what_it_wrote(windows: tuple[int | None, ...], host_cache: str) -> None:
    engine, twin = (run(windows, host_cache, compiled) for compiled in (False, True))
    manager, done = engine.manager, engine.done
    assert manager.stats() == twin.manager.stats()
    assert np.array_equal(manager.table.blocks, twin.manager.table.blocks)
    never = {verb for verb in EVERY if not done[verb]}
    assert not never, f"this seed never does {never}"
    assert (done["dropped"] > 0) == any(windows)
    while engine.flights:
        engine.end()
    manager.free([stream.handle for stream in engine.streams])
    for pin in engine.pins:
        manager.unpin(pin)
    manager.check()
    stats = manager.stats()
    assert all(tier.free + tier.cached + 1 == tier.num_blocks for tier in stats.tiers)
    assert stats.counters.prefix_hit_tokens > 0
    assert stats.counters.prefix_collisions == stats.counters.invariant_violations == 0
    if host_cache != "off":
        assert min(stats.counters.demoted_blocks, done["promotion"], done["cancelled promotion"]) > 0
    assert manager.clear() == sum(tier.cached for tier in stats.tiers)
    assert all(tier.free + 1 == tier.num_blocks for tier in manager.stats().tiers)
    manager.check()
