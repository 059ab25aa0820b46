"""Whom to preempt: enough and no more than helps, with what it costs, and nothing changes."""

from __future__ import annotations

import pytest
from managers import KINDS, Make, filled, run
from snapshot import differences, snapshot

from pagemgr.errors import InvalidInput, StaleSequence

pytestmark = KINDS


def test_as_many_as_are_needed_in_the_order_given(make: Make) -> None:
    manager = make(13, 2, num_host_blocks=4)
    new = manager.add()
    a, b, c = (filled(manager, [n] * 7) for n in (1, 2, 3))
    before = snapshot(manager)
    plan = manager.preemption([new], [10], [c, b, a])
    assert not differences(before, snapshot(manager))
    assert (plan.swap_out, plan.drop, plan.missing) == ((), (c, b), 0)  # 3 blocks of the host hold none of 4
    assert (plan.blocks, plan.dropped_tokens, plan.swapped_blocks) == (8, 14, 0)
    assert manager.preemption([new], [8], [c, b, a]).drop == (c,)  # just enough is enough
    manager.free(list(plan.drop))
    run(manager, [new], [10])


def test_swapped_while_the_host_has_room(make: Make) -> None:
    manager = make(13, 2, num_host_blocks=6)
    new = manager.add()
    a, b, _ = (filled(manager, [n] * 7) for n in (1, 2, 3))
    plan = manager.preemption([new], [14], [a, b])
    assert (plan.swap_out, plan.drop, plan.swapped_blocks) == ((a,), (b,), 4)
    manager.finish(manager.swap_out(list(plan.swap_out)))
    manager.free(list(plan.drop))
    run(manager, [new], [14])
    manager.check()


def test_nobody_goes_if_there_is_room(make: Make) -> None:
    manager = make(13, 2)
    new, a = manager.add(), filled(manager, [1, 2, 3])
    plan = manager.preemption([new], [4], [a])
    assert (plan.swap_out, plan.drop, plan.blocks, plan.missing) == ((), (), 0, 0)


def test_sharers_count_together_and_those_that_give_nothing_stay(make: Make) -> None:
    manager = make(9, 2)
    new = manager.add()
    a = filled(manager, [1, 2, 3, 4])
    twin, useless = manager.fork(a)[0], filled(manager, [5, 5, 5, 5, 5, 5, 5, 5])
    (keeper,) = manager.fork(useless)
    plan = manager.preemption([new], [8], [useless, a, twin])
    assert (plan.drop, plan.blocks) == ((a, twin), 2)
    assert manager.preemption([new], [8], [a]).missing == 2  # its twin holds everything
    manager.free([a, twin, keeper])


def test_a_tail_that_has_to_be_copied_needs_room_as_well(make: Make) -> None:
    manager = make(5, 2)
    a, b = filled(manager, [1]), filled(manager, [2] * 5)
    manager.fork(a)
    plan = manager.preemption([a], [1], [b])
    assert plan.drop == (b,)
    manager.free([b])
    run(manager, [a], [[1]])


def test_busy_candidates_are_passed_over(make: Make) -> None:
    manager = make(5, 2, num_host_blocks=9)
    new, a, b = manager.add(), filled(manager, [1, 2, 3]), filled(manager, [4, 5, 6])
    plan = manager.reserve([a], [[4]])
    found = manager.preemption([new], [4], [a, b])
    assert (found.swap_out, found.missing) == ((b,), 0)
    manager.commit(plan)


def test_what_the_host_holds_costs_nothing(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3, 4, 5])
    (b,) = manager.fork(a)
    manager.finish(manager.swap_out([b]))
    manager.free([b])
    new = manager.add()
    found = manager.preemption([new], [14], [a])
    assert (found.swap_out, found.swapped_blocks) == ((a,), 1)  # two full blocks are there already


def test_what_the_host_holds_already_is_no_room_for_others(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=5)
    a = filled(manager, [1, 2, 3, 4, 5])
    (twin,) = manager.fork(a)
    manager.finish(manager.swap_out([twin]))
    manager.free([twin])
    c, new = filled(manager, [9] * 5), manager.add()
    assert manager.stats().tiers[1].cached == 2  # of the four blocks there, and a needs both of them and one more
    plan = manager.preemption([new], [16], [c, a])
    assert (plan.swap_out, plan.drop, plan.swapped_blocks) == ((c,), (a,), 3)
    manager.finish(manager.swap_out(list(plan.swap_out)))
    manager.free(list(plan.drop))
    run(manager, [new], [16])


def test_bad_input(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add()
    with pytest.raises(InvalidInput, match="1 sequences but 2 counts"):
        manager.preemption([a], [1, 2], [])
    manager.free([a])
    with pytest.raises(StaleSequence):
        manager.preemption([manager.add()], [99], [a])
