"""Events: numbered, complete, cheap, and enough to know what is where."""

from __future__ import annotations

import hashlib

import pytest
from managers import KINDS, Make, filled, run

from pagemgr.errors import EventsLost
from pagemgr.fuzz.listener import Listener
from pagemgr.prefix import Namespace, hash_blocks

pytestmark = KINDS


def test_stored_blocks_say_what_they_hold_and_follow(make: Make) -> None:
    manager = make(16, 2)
    listener = Listener(manager)
    space = Namespace(tenant="x")
    a = filled(manager, [1, 2, 3, 4, 5], space)
    run(manager, [a], [[6]])
    first, second = listener.read()
    names = hash_blocks(space.root(2), a_tokens := manager.tiers[0].index.tokens[[1, 2, 3]].reshape(-1), 2)
    assert a_tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert (first.kind, first.tier, first.reason, first.parent) == ("stored", "device", "computed", None)
    assert (first.tokens, first.block_size, first.group) == ((1, 2, 3, 4), 2, 0)
    assert b"".join(first.names + second.names) == names
    assert (second.parent, second.tokens) == (first.names[1], (5, 6))


def test_blocks_of_one_step_that_do_not_follow_each_other_come_apart(make: Make) -> None:
    manager = make(16, 2)
    a = filled(manager, [1, 2, 3, 4])
    (b,) = manager.fork(a)
    listener = Listener(manager)
    run(manager, [a, b], [[5, 6], [7, 8, 9, 9]])
    first, second = listener.read()
    assert (first.tokens, second.tokens) == ((5, 6), (7, 8, 9, 9))
    assert first.parent == second.parent == manager.tiers[0].index.names[2].tobytes()


def test_eviction_and_clear_say_so(make: Make) -> None:
    manager = make(5, 2)
    listener = Listener(manager)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    run(manager, [manager.add()], [[9] * 5])
    kinds = [(event.kind, event.reason, len(event.names)) for event in listener.read()]
    assert kinds == [("stored", "computed", 2), ("removed", "evicted", 1), ("stored", "computed", 2)]
    manager.clear()
    assert [(event.kind, event.reason) for event in listener.read()] == [("removed", "cleared")]
    listener.check()


def test_a_tier_with_nothing_left_is_cleared(make: Make) -> None:
    manager = make(9, 2)
    manager.free([filled(manager, [1, 2, 3])])
    listener = Listener(manager)
    manager.clear()
    assert [event.kind for event in listener.read()] == ["cleared"]
    manager.clear()
    assert listener.read() == []
    listener.check()


def test_moves_name_both_tiers(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    listener = Listener(manager)
    a = filled(manager, [1, 2, 3])
    manager.finish(manager.swap_out([a]))
    moved = listener.read()[-1]
    assert (moved.kind, moved.tier, moved.target, moved.reason) == ("moved", "device", "host", "swapped")
    listener.check()


def test_late_joiners_get_what_there_is_parents_first(make: Make) -> None:
    manager = make(32, 2, num_host_blocks=9, windows=(None, 5), rollback=0)
    a = filled(manager, [1, 2, 3, 4, 5, 6, 7])
    filled(manager, [1, 2, 3, 4, 9, 9, 9])
    manager.finish(manager.swap_out([a]))
    Listener(manager).check()


def test_a_listener_that_falls_behind_is_told(make: Make) -> None:
    manager = make(9, 2)
    slow, quick = manager.subscribe(limit=2), Listener(manager)
    for token in range(4):
        filled(manager, [token] * 3)
    assert [event.number for event in slow.drain(1) + slow.drain()] == [1, 2]
    with pytest.raises(EventsLost) as raised:
        slow.drain()
    assert raised.value.limit == 2
    assert len(quick.read()) == 4
    manager.unsubscribe(slow)
    quick.check()


def test_nothing_is_made_when_nobody_listens(make: Make) -> None:
    manager = make(9, 2)
    listener = manager.subscribe()
    manager.unsubscribe(listener)
    filled(manager, [1, 2, 3])
    assert (manager.events.number, listener.drain()) == (0, [])


def test_names_of_events_are_published_vectors(make: Make) -> None:
    """Routers compute names themselves: what stands in pagemgr/README.md is what comes."""
    manager = make(9, 2)
    listener = Listener(manager)
    filled(manager, [1, 2, 3])
    root = hashlib.sha256((16).to_bytes(8, "little") + b"pagemgr prefix 1" + (2).to_bytes(8, "little")).digest()
    expected = hashlib.sha256(root + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")).digest()
    assert listener.read()[0].names == (expected,)
