"""Moving sequences between the tiers, and back, with what they share."""

from __future__ import annotations

import pytest
from managers import KINDS, Gate, Make, blocks, cached_tokens, filled, run, states

from pagemgr.errors import InvalidInput, OutOfBlocks, SequenceBusy, StepOrderError, WrongTier
from pagemgr.manager import BlockManager
from pagemgr.plan import Transfer
from pagemgr.sequences import Sequence

pytestmark = KINDS


def pairs(transfer: Transfer) -> list[tuple[int, int]]:
    assert all((copied.source, copied.target) == (transfer.source, transfer.target) for copied in transfer.copies)
    return [(a, b) for copied in transfer.copies for a, b in copied.pairs.tolist()]


def out(manager: BlockManager, *sequences: Sequence) -> list[tuple[int, int]]:
    transfer = manager.swap_out(sequences)
    manager.finish(transfer)
    return pairs(transfer)


def back(manager: BlockManager, *sequences: Sequence) -> list[tuple[int, int]]:
    transfer = manager.swap_in(sequences)
    manager.finish(transfer)
    return pairs(transfer)


def test_there_and_back(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    transfer = manager.swap_out([a])
    assert (transfer.source, transfer.target, transfer.num_copied) == ("device", "host", 2)
    assert pairs(transfer) == [(1, 1), (2, 2)]
    assert [moved.tolist() for moved in transfer.moved] == [[1, 2]]
    assert states(manager) == {"free": 6, "open": 1, "full": 1}  # both sides are held while the bytes move
    assert states(manager, 1) == {"free": 6, "open": 2}
    manager.finish(transfer)
    assert states(manager) == {"free": 7, "cached": 1}
    assert states(manager, 1) == {"free": 6, "open": 1, "full": 1}
    assert back(manager, a) == [(2, 2)]  # the device still had the full block
    assert blocks(manager, a) == [1, 2]
    assert manager.lengths([a]).tolist() == [3]
    counters = manager.stats().counters
    assert counters.swapped_blocks == {"out": 2, "in": 1}
    assert counters.swapped_sequences == {"out": 1, "in": 1}


def test_shared_blocks_are_copied_once_and_shared_again(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    run(manager, [b], [[4, 5]])
    assert (blocks(manager, a), blocks(manager, b)) == ([1, 2], [1, 3, 4])
    assert out(manager, b, a) == [(1, 1), (3, 2), (4, 3), (2, 4)]
    assert (blocks(manager, b), blocks(manager, a)) == ([1, 2, 3], [1, 4])
    assert manager.stats().tiers[1].saved == 1
    z = filled(manager, [9] * 15)  # evicts what the device kept
    manager.free([z])
    assert len(back(manager, a, b)) == 4
    assert blocks(manager, a)[0] == blocks(manager, b)[0]


def test_what_the_host_holds_is_not_copied_again(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3, 4, 5])
    b = filled(manager, [1, 2, 3, 4, 6])
    assert out(manager, a) == [(1, 1), (2, 2), (3, 3)]
    assert out(manager, b) == [(4, 4)]
    assert blocks(manager, b) == [1, 2, 4]


def test_what_came_back_stays_cached_in_the_host(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    out(manager, a)
    back(manager, a)
    assert states(manager, 1) == {"free": 7, "cached": 1}
    assert out(manager, a) == [(2, 2)]


def test_a_sequence_goes_on_after_it_came_back(make: Make) -> None:
    manager = make(9, 4, num_host_blocks=9)
    a = filled(manager, [1, 2])
    out(manager, a)
    back(manager, a)
    run(manager, [a], [[3, 4, 5]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4
    manager.check()


def test_cancel_leaves_the_sequences_where_they_were(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    manager.cancel(manager.swap_out([a]))
    assert states(manager) == {"free": 6, "open": 1, "full": 1}
    assert states(manager, 1) == {"free": 8}
    assert manager.stats().counters.swap_failures == {"out": 1, "in": 0}
    run(manager, [a], [[4]])
    assert blocks(manager, a) == [1, 2]


def test_the_host_is_full(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=3)
    a, b = filled(manager, [1, 2, 3]), filled(manager, [4, 5, 6])
    with pytest.raises(OutOfBlocks) as raised:
        manager.swap_out([a, b])
    error = raised.value
    assert (error.requested, error.available, error.fenced, error.tier) == (4, 2, 0, "host")
    assert len(out(manager, a)) == 2


def test_what_the_host_holds_is_not_evicted_for_the_rest(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=4)
    a = filled(manager, [1, 2, 3, 4])
    out(manager, a)
    back(manager, a)  # the host keeps both of its blocks cached, 2 the first to go
    b = filled(manager, [7, 7, 7, 7])
    assert out(manager, b) == [(3, 3), (4, 2)]
    back(manager, b)  # cached by time of release: 1, then 2 and 3 of b
    c = filled(manager, [1, 2, 9, 9])
    assert out(manager, c) == [(5, 2)]  # block 1 is the oldest, but c needs it
    assert blocks(manager, c) == [1, 2]


def test_held_blocks_are_not_available(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=3)
    a = filled(manager, [1, 2, 3, 4])
    out(manager, a)
    back(manager, a)
    b = filled(manager, [1, 2, 3, 4, 5])
    with pytest.raises(OutOfBlocks) as raised:
        manager.swap_out([b])
    assert (raised.value.requested, raised.value.available) == (1, 0)


def test_the_source_waits_for_the_copy(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    gate = Gate()
    manager.finish(manager.swap_out([a]), after=gate)
    assert states(manager) == {"free": 6, "fenced": 2}
    gate.passed = True
    assert states(manager) == {"free": 7, "cached": 1}


def test_the_source_waits_for_the_steps_in_flight(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a, b = filled(manager, [1]), manager.add()
    plan = manager.reserve([b], [1])
    out(manager, a)
    assert states(manager) == {"free": 6, "open": 1, "fenced": 1}
    manager.commit(plan)
    assert states(manager) == {"free": 7, "open": 1}


def test_a_copy_in_vain_waits_for_its_fence(make: Make) -> None:
    """Somebody publishes the same prefix while the bytes move: the block that they still go to is not given out."""
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2])
    out(manager, a)
    manager.free([filled(manager, [9] * 16)])
    transfer = manager.swap_in([a])
    ((_, target),) = pairs(transfer)
    c = filled(manager, [1, 2])
    gate = Gate()
    manager.finish(transfer, after=gate)
    assert blocks(manager, a) == blocks(manager, c)
    assert states(manager)["fenced"] == 1
    assert target not in manager.reserve([manager.add()], [12]).block_table
    gate.passed = True
    assert "fenced" not in states(manager)


def test_two_transfers_of_one_prefix_share_in_the_end(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2])
    (b,) = manager.fork(a)
    first, second = manager.swap_out([a]), manager.swap_out([b])
    assert (pairs(first), pairs(second)) == ([(1, 1)], [(1, 2)])
    manager.finish(second)
    manager.finish(first)
    assert blocks(manager, a) == blocks(manager, b) == [2]
    assert states(manager, 1) == {"free": 7, "full": 1}


def test_forks_and_cuts_in_the_host(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    out(manager, a)
    (b,) = manager.fork(a)
    manager.truncate([a], [2])
    assert (blocks(manager, a), blocks(manager, b)) == ([1], [1, 2])
    manager.free([b])
    assert states(manager, 1) == {"free": 7, "full": 1}
    back(manager, a)
    assert manager.lengths([a]).tolist() == [2]


def test_prefixes_of_the_host_are_not_matched(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    out(manager, a)
    manager.free([filled(manager, [9] * 16)])
    assert cached_tokens(manager, [1, 2, 3]) == 0
    back(manager, a)
    assert cached_tokens(manager, [1, 2, 3]) == 2


def test_what_is_refused_while_a_sequence_moves(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1])
    transfer = manager.swap_out([a])
    for verb in (
        lambda: manager.free([a]),
        lambda: manager.fork(a),
        lambda: manager.truncate([a], [0]),
        lambda: manager.reserve([a], [1]),
        lambda: manager.swap_out([a]),
        lambda: manager.swap_in([a]),
    ):
        with pytest.raises(SequenceBusy, match="it is being swapped"):
            verb()
    manager.finish(transfer)


def test_a_sequence_in_the_wrong_tier(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a, b = filled(manager, [1]), filled(manager, [2])
    with pytest.raises(WrongTier) as raised:
        manager.swap_in([a])
    assert (raised.value.row, raised.value.tier, raised.value.needed) == (a.row, "device", "host")
    out(manager, a)
    for verb in (lambda: manager.swap_out([b, a]), lambda: manager.reserve([b, a], [1, 1])):
        with pytest.raises(WrongTier) as raised:
            verb()
        assert (raised.value.row, raised.value.tier, raised.value.needed) == (a.row, "host", "device")


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_a_transfer_ends_once(make: Make, end: str) -> None:
    manager = make(9, 2, num_host_blocks=9)
    transfer = manager.swap_out([filled(manager, [1])])
    getattr(manager, end)(transfer)
    for verb in (manager.finish, manager.cancel):
        with pytest.raises(StepOrderError, match="not under way"):
            verb(transfer)


def test_without_a_host_tier(make: Make) -> None:
    manager = make(9, 2)
    with pytest.raises(InvalidInput, match="no host tier"):
        manager.swap_out([filled(manager, [1])])


def test_nothing_to_move(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = manager.add()
    assert out(manager, a) == []
    assert out(manager) == []
    assert back(manager, a) == []
    run(manager, [a], [[1]])
