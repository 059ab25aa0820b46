"""Pins: nothing that is pinned is evicted, owners keep to their quota, and pins end when they should."""

from __future__ import annotations

import pytest
from managers import KINDS, Make, cached_tokens, filled, run, states

from pagemgr.errors import InvalidInput, OutOfBlocks, PinQuotaExceeded, StalePin, WrongTier

pytestmark = KINDS


def test_what_is_pinned_outlives_its_sequence_and_any_pressure(make: Make) -> None:
    manager = make(8, 2, pin_quota=4)
    a = filled(manager, [1, 2, 3, 4, 5])
    pin = manager.pin(a, "system prompt")
    assert pin.length == 4
    manager.free([a])
    stats = manager.stats().device
    assert (stats.pinned, stats.used, stats.full, stats.free) == (2, 0, 2, 5)
    other = manager.add()
    with pytest.raises(OutOfBlocks) as raised:
        manager.reserve([other], [12])
    assert (raised.value.requested, raised.value.available) == (6, 5)
    run(manager, [other], [10])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4
    manager.free([other])
    manager.unpin(pin)
    assert states(manager) == {"free": 5, "cached": 2}
    manager.check()


def test_a_pin_of_a_part(make: Make) -> None:
    manager = make(8, 2, pin_quota=4)
    a = filled(manager, [1, 2, 3, 4, 5])
    pin = manager.pin(a, "me", length=3)
    assert (pin.length, len(pin.blocks)) == (2, 1)
    for length in (-1, 6):
        with pytest.raises(InvalidInput, match=f"length {length} is not in"):
            manager.pin(a, "me", length=length)


def test_owners_keep_to_their_quota(make: Make) -> None:
    manager = make(12, 2, pin_quota=3)
    a = filled(manager, [1, 2, 3, 4, 5])
    first = manager.pin(a, "x")
    with pytest.raises(PinQuotaExceeded) as raised:
        manager.pin(a, "x")
    assert (raised.value.owner, raised.value.requested, raised.value.pinned, raised.value.quota) == ("x", 2, 2, 3)
    manager.unpin(manager.pin(a, "x", length=2))  # as many as it may
    manager.unpin(manager.pin(a, "x", length=2))  # and once they are back, again
    second = manager.pin(a, "y")
    manager.free([a])
    assert manager.stats().device.pinned == 2  # blocks, however often they are pinned
    assert manager.stats().counters.failures["pin_quota_exceeded"] == 1
    manager.unpin(first)
    assert manager.stats().device.pinned == 2
    manager.unpin(second)
    assert manager.stats().device.pinned == 0
    with pytest.raises(StalePin, match="of 'y' has ended"):
        manager.unpin(second)


def test_pins_end_by_the_callers_clock(make: Make) -> None:
    manager = make(12, 2, pin_quota=9)
    a = filled(manager, [1, 2, 3])
    for until in (10.0, 20.0, None):
        manager.pin(a, "me", until=until)
    manager.free([a])
    assert [manager.expire(now) for now in (9.9, 10.0, 5.0, 1e9)] == [0, 1, 0, 1]
    assert manager.stats().device.pinned == 1
    manager.check()


def test_what_is_in_the_host_cannot_be_pinned(make: Make) -> None:
    manager = make(8, 2, num_host_blocks=8, pin_quota=9)
    a = filled(manager, [1, 2, 3])
    manager.finish(manager.swap_out([a]))
    with pytest.raises(WrongTier):
        manager.pin(a, "me")


def test_clear_spares_pins_and_sequences(make: Make) -> None:
    manager = make(16, 2, pin_quota=9)
    a, b, c = (filled(manager, [n, n, n, n, n]) for n in (1, 2, 3))
    pin = manager.pin(a, "me")
    manager.free([a, b])
    assert manager.clear() == 2
    assert manager.stats().counters.cleared_blocks == 2
    assert [cached_tokens(manager, [n, n, n, n, n]) for n in (1, 2, 3)] == [4, 0, 4]
    manager.free([c])
    manager.unpin(pin)
    assert manager.clear() == 4
    assert states(manager) == {"free": 15}
