"""A call that raises changes nothing: every refusal, and a fault at each point where something can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from managers import KINDS, Gate, Make, filled, run, states
from snapshot import ENDED_BY_ABORT, differences, snapshot

from pagemgr import manager as manager_module
from pagemgr.errors import (
    InvalidInput,
    OutOfBlocks,
    OutOfSequences,
    PagemgrError,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepOrderError,
    WrongTier,
)
from pagemgr.manager import BlockManager
from pagemgr.plan import Plan, Transfer
from pagemgr.sequences import Sequence

pytestmark = KINDS


class Scene:
    """A manager with something of everything: every state of a block, every state of a sequence."""

    def __init__(self, make: Make) -> None:
        self.manager = manager = make(26, 2, max_sequences=11, max_seq_len=20, num_host_blocks=5)
        self.gate = Gate()
        self.old = filled(manager, [9, 9, 9])
        manager.free([self.old])
        manager.free([filled(manager, [8, 8, 8])], after=self.gate)
        self.a = filled(manager, [1, 2, 3])
        self.b, self.c = manager.fork(self.a, 2)
        self.in_host = filled(manager, [4, 5])
        manager.finish(manager.swap_out([self.in_host]))
        self.moving = filled(manager, [6, 7, 6])
        self.transfer: Transfer = manager.swap_out([self.moving])
        self.ended_transfer: Transfer = manager.swap_in([self.in_host])
        manager.cancel(self.ended_transfer)
        self.long = filled(manager, [3] * 15)
        self.busy, self.busy_too = manager.add_many([[], []])
        self.committed: Plan = run(manager, [self.busy], [1])
        self.first: Plan = manager.reserve([self.busy, self.busy_too], [[1], 1])
        self.second: Plan = manager.reserve([self.busy], [2])
        manager.stats()


REFUSALS: list[tuple[str, type[PagemgrError], Callable[[BlockManager, Scene], Any]]] = [
    ("add: no row", OutOfSequences, lambda m, s: m.add_many([[1, 2, 3]] * 4)),
    ("add: too long", SequenceTooLong, lambda m, s: m.add_many([[1, 2, 3], [1] * 21])),
    ("add: bad id", InvalidInput, lambda m, s: m.add_many([[1, 2, 3], [-1]])),
    ("add: namespaces", InvalidInput, lambda m, s: m.add_many([[1, 2, 3]], [])),
    ("fork: none", InvalidInput, lambda m, s: m.fork(s.a, 0)),
    ("fork: no row", OutOfSequences, lambda m, s: m.fork(s.a, 4)),
    ("fork: stale", StaleSequence, lambda m, s: m.fork(s.old)),
    ("fork: in flight", SequenceBusy, lambda m, s: m.fork(s.busy)),
    ("fork: moving", SequenceBusy, lambda m, s: m.fork(s.moving)),
    ("truncate: stale", StaleSequence, lambda m, s: m.truncate([s.a, s.old], [0, 0])),
    ("truncate: twice", InvalidInput, lambda m, s: m.truncate([s.a, s.a], [0, 0])),
    ("truncate: in flight", SequenceBusy, lambda m, s: m.truncate([s.a, s.busy], [0, 0])),
    ("truncate: moving", SequenceBusy, lambda m, s: m.truncate([s.a, s.moving], [0, 0])),
    ("truncate: longer", InvalidInput, lambda m, s: m.truncate([s.a, s.b], [0, 4])),
    ("truncate: negative", InvalidInput, lambda m, s: m.truncate([s.a, s.b], [0, -1])),
    ("truncate: too few", InvalidInput, lambda m, s: m.truncate([s.a, s.b], [0])),
    ("free: stale", StaleSequence, lambda m, s: m.free([s.a, s.old])),
    ("free: no such row", StaleSequence, lambda m, s: m.free([s.a, Sequence(5, 9)])),
    ("free: twice", InvalidInput, lambda m, s: m.free([s.a, s.a])),
    ("free: moving", SequenceBusy, lambda m, s: m.free([s.a, s.moving])),
    ("free: no fence", InvalidInput, lambda m, s: m.free([s.a], after=1)),  # type: ignore[arg-type]
    ("lengths: stale", StaleSequence, lambda m, s: m.lengths([s.a, s.old])),
    ("reserve: out of blocks", OutOfBlocks, lambda m, s: m.reserve([s.a, s.b, s.c, s.busy], [13, 13, 13, 13])),
    ("reserve: too long", SequenceTooLong, lambda m, s: m.reserve([s.a, s.long], [1, 6])),
    ("reserve: count too long", SequenceTooLong, lambda m, s: m.reserve([s.a, s.b], [1, 21])),
    ("reserve: stale", StaleSequence, lambda m, s: m.reserve([s.a, s.old], [1, 1])),
    ("reserve: twice", InvalidInput, lambda m, s: m.reserve([s.a, s.a], [1, 1])),
    ("reserve: in host", WrongTier, lambda m, s: m.reserve([s.a, s.in_host], [1, 1])),
    ("reserve: moving", SequenceBusy, lambda m, s: m.reserve([s.a, s.moving], [1, 1])),
    ("reserve: nobody", InvalidInput, lambda m, s: m.reserve([], [])),
    ("reserve: nothing", InvalidInput, lambda m, s: m.reserve([s.a, s.b], [1, 0])),
    ("reserve: too few", InvalidInput, lambda m, s: m.reserve([s.a, s.b], [1])),
    ("reserve: bad id", InvalidInput, lambda m, s: m.reserve([s.a, s.b], [[1], [2**31]])),
    ("commit: not the oldest", StepOrderError, lambda m, s: m.commit(s.second)),
    ("commit: ended", StepOrderError, lambda m, s: m.commit(s.committed)),
    ("commit: too few ids", InvalidInput, lambda m, s: m.commit(s.first, [None])),
    ("commit: known ids", InvalidInput, lambda m, s: m.commit(s.first, [[1], [2]])),
    ("commit: too many ids", InvalidInput, lambda m, s: m.commit(s.first, [None, [2, 2]])),
    ("commit: bad id", InvalidInput, lambda m, s: m.commit(s.first, [None, [-1]])),
    ("abort: not the newest", StepOrderError, lambda m, s: m.abort(s.first)),
    ("abort: ended", StepOrderError, lambda m, s: m.abort(s.committed)),
    ("swap out: host is full", OutOfBlocks, lambda m, s: m.swap_out([s.a, s.b])),
    ("swap out: stale", StaleSequence, lambda m, s: m.swap_out([s.a, s.old])),
    ("swap out: twice", InvalidInput, lambda m, s: m.swap_out([s.a, s.a])),
    ("swap out: in flight", SequenceBusy, lambda m, s: m.swap_out([s.a, s.busy])),
    ("swap out: in host", WrongTier, lambda m, s: m.swap_out([s.a, s.in_host])),
    ("swap in: moving", SequenceBusy, lambda m, s: m.swap_in([s.in_host, s.moving])),
    ("swap in: on device", WrongTier, lambda m, s: m.swap_in([s.in_host, s.a])),
    ("finish: ended", StepOrderError, lambda m, s: m.finish(s.ended_transfer)),
    ("finish: no fence", InvalidInput, lambda m, s: m.finish(s.transfer, after="now")),  # type: ignore[arg-type]
    ("cancel: ended", StepOrderError, lambda m, s: m.cancel(s.ended_transfer)),
]


@pytest.mark.parametrize(("error", "call"), [pytest.param(*rest, id=name) for name, *rest in REFUSALS])
def test_a_refusal_changes_nothing(
    make: Make, error: type[PagemgrError], call: Callable[[BlockManager, Scene], Any]
) -> None:
    scene = Scene(make)
    before = snapshot(scene.manager)
    with pytest.raises(error) as raised:
        call(scene.manager, scene)
    assert raised.type is error
    assert not differences(before, snapshot(scene.manager))
    scene.manager.check()


def test_out_of_blocks_on_the_way_in(make: Make) -> None:
    scene = Scene(make)
    manager = scene.manager
    while free := manager.stats().device.free:
        manager.reserve([manager.add()], [2 * min(free, 10)])
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.reserve([scene.a, scene.b], [3, 3])
    assert not differences(before, snapshot(manager))


def test_the_scene_has_something_of_everything(make: Make) -> None:
    scene = Scene(make)
    assert set(states(scene.manager)) == {"free", "open", "full", "cached", "fenced"}
    assert set(states(scene.manager, 1)) == {"free", "open", "full"}


def test_an_iterable_that_raises_changes_nothing(make: Make) -> None:
    def broken() -> Any:
        yield 1
        raise RuntimeError("the tokenizer died")

    scene = Scene(make)
    before = snapshot(scene.manager)
    for call in (
        lambda: scene.manager.add_many([[1], broken()]),
        lambda: scene.manager.reserve([scene.a, scene.b], [[1], broken()]),
        lambda: scene.manager.commit(scene.first, [None, broken()]),
        lambda: scene.manager.free(handle for handle in broken()),
    ):
        with pytest.raises((RuntimeError, AttributeError)):
            call()
        assert not differences(before, snapshot(scene.manager))


# Abort --------------------------------------------------------------------------------------------------------------

RESERVATIONS: dict[str, Callable[[Scene], list[tuple[list[Sequence], Any]]]] = {
    "in place": lambda s: [([s.long], [[1]])],
    "new blocks": lambda s: [([s.long], [3])],
    "all sharers": lambda s: [([s.a, s.b, s.c], [[1], 2, [3]])],
    "some sharers": lambda s: [([s.a, s.c], [1, 1])],
    "two steps": lambda s: [([s.a, s.long], [1, 2]), ([s.long, s.b, s.c], [1, 3, 1])],
    "of what is in flight": lambda s: [([s.busy_too, s.busy], [1, 1])],
}


@pytest.mark.parametrize("older", [False, True], ids=["alone", "beside older steps"])
@pytest.mark.parametrize("batches", RESERVATIONS.values(), ids=RESERVATIONS)
def test_abort_leaves_what_was_before_reserve(
    make: Make, batches: Callable[[Scene], list[tuple[list[Sequence], Any]]], older: bool
) -> None:
    scene = Scene(make)
    manager = scene.manager
    for plan in () if older else (scene.first, scene.second):
        manager.commit(plan)
    evicted = manager.stats().device.evicted_total
    before = snapshot(manager, ENDED_BY_ABORT)
    plans = [manager.reserve(sequences, tokens) for sequences, tokens in batches(scene)]
    assert differences(before, snapshot(manager, ENDED_BY_ABORT))
    for plan in reversed(plans):
        manager.abort(plan)
    assert manager.stats().device.evicted_total == evicted  # and what only waited for these steps is let go of
    assert not differences(before, snapshot(manager, ENDED_BY_ABORT))
    manager.check()


# Faults -------------------------------------------------------------------------------------------------------------


class Injected(Exception):
    """What an allocation, a policy, a fence or a hash may raise."""


class Faults:
    """Makes the n-th call of any watched function raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.left: int | None = None

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            self.monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    raise Injected
            return function(*args, **more)

        return counted


def crowded(make: Make) -> tuple[BlockManager, dict[str, Any]]:
    """Little is free in either tier, so that verbs must evict; some of what moves is held by the other side."""
    manager = make(10, 2, num_host_blocks=7)
    gate = Gate()
    a = filled(manager, [1, 2, 3, 4])
    manager.finish(manager.swap_out([a]))
    manager.finish(manager.swap_in([a]))  # the host has [1, 2] and [3, 4] cached
    host = filled(manager, [7, 7, 7])
    over = filled(manager, [8, 8, 8])
    manager.finish(manager.swap_out([host, over]))
    manager.free([over])  # one of its blocks stays cached in the host
    manager.free([filled(manager, [9, 9])], after=gate)
    (b,) = manager.fork(a)
    manager.truncate([b], [3])
    manager.free([filled(manager, [6, 6, 6, 6, 6, 6])])
    flying = manager.add()
    plan = manager.reserve([flying], [1])
    return manager, {"a": a, "b": b, "host": host, "plan": plan, "flying": flying, "gate": gate}


VERBS: dict[str, Callable[[BlockManager, dict[str, Any]], Any]] = {
    "add": lambda m, s: m.add_many([[1, 2, 3], [6, 6, 6]]),
    "fork": lambda m, s: m.fork(s["a"], 2),
    "truncate": lambda m, s: m.truncate([s["a"], s["b"]], [1, 1]),
    "free": lambda m, s: m.free([s["a"], s["b"]], after=s["gate"]),
    "free at once": lambda m, s: m.free([s["a"], s["b"]]),
    "reserve, evicting": lambda m, s: m.reserve([s["a"], s["b"]], [[5, 5, 5, 5], 2]),
    "reserve in place": lambda m, s: m.reserve([s["flying"]], [1]),
    "commit": lambda m, s: m.commit(s["plan"], [[5]]),
    "abort": lambda m, s: m.abort(s["plan"]),
    "swap out, evicting": lambda m, s: m.swap_out([s["a"]]),
    "swap in, evicting": lambda m, s: m.swap_in([s["host"]]),
    "stats": lambda m, s: m.stats(),
}


CANNOT_FAIL = {"add": ("find",), "commit": ("find", "hash")}
"""Look-ups and hashes of 32 bytes amid what changes."""


def prepared(make: Make, verb: str) -> tuple[BlockManager, dict[str, Any]]:
    manager, scene = crowded(make)
    if verb == "swap out, evicting":
        manager.commit(scene["plan"])
        run(manager, [scene["a"]], [[5, 5, 5]])
    if verb == "swap in, evicting":
        manager.commit(scene["plan"])
        if free := manager.stats().device.free:
            run(manager, [manager.add()], [[3] * (2 * free)])
    manager.stats()
    return manager, scene


@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_each_point_in_turn(make: Make, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = VERBS[verb]
    points = 0
    while True:
        manager, scene = prepared(make, verb)
        with monkeypatch.context() as patch:
            faults = Faults(patch)
            for tier in manager.tiers:
                faults.watch(tier.pool, "peek", "poll")
                faults.watch(tier.pool.policy, "victims")
                faults.watch(tier.index, *(name for name in ("find", "hash") if name not in CANNOT_FAIL.get(verb, ())))
            faults.watch(scene["gate"], "query")
            faults.watch(manager_module, "pack_tokens", "pack_batch", "fill_in")
            before = snapshot(manager)
            faults.left = points + 1
            try:
                call(manager, scene)
            except Injected:
                points += 1
            else:
                break
            faults.left = None
            assert not differences(before, snapshot(manager)), f"fault {points} of {verb}"
            manager.check()
            call(manager, scene)
            manager.check()
    assert points >= 3  # two pools and a fence are asked by every verb
