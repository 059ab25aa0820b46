"""Giving blocks back: truncate, fork and free, and what fences hold back."""

from __future__ import annotations

import pytest
from managers import KINDS, Gate, Make, blocks, cached_tokens, filled, run, states

from pagemgr.errors import InvalidInput, OutOfBlocks, StaleSequence
from pagemgr.manager import BlockManager
from pagemgr.sequences import Batch, Sequence

pytestmark = KINDS


def taken_next(manager: BlockManager, count: int) -> list[int]:
    """Blocks that a new sequence gets, in order; they are given back as if nothing had happened."""
    sequence = manager.add()
    plan = manager.reserve([sequence], [count * manager.block_size])
    manager.abort(plan)
    manager.free([sequence])
    return plan.block_table[0].tolist()


# Free ---------------------------------------------------------------------------------------------------------------


def test_blanks_are_reused_last_released_first(make: Make) -> None:
    manager = make(9, 2, prefix_caching=False)
    filled(manager, [0] * 4)
    b = filled(manager, [0] * 6)
    manager.free([b])  # released tail first: 5 4 3
    assert taken_next(manager, 6) == [3, 4, 5, 6, 7, 8]


def test_a_freed_handle_is_stale_for_every_verb(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a, b = filled(manager, [1]), filled(manager, [2])
    manager.free([a])
    new = manager.add()
    assert new.row == a.row
    for verb in (
        lambda: manager.free([b, a]),
        lambda: manager.fork(a),
        lambda: manager.truncate([a], [0]),
        lambda: manager.reserve([b, a], [1, 1]),
        lambda: manager.lengths([a]),
        lambda: manager.swap_out([a]),
        lambda: manager.swap_in([b, a]),
    ):
        with pytest.raises(StaleSequence, match="was freed") as raised:
            verb()
        assert (raised.value.row, raised.value.generation) == (a.row, a.generation)
    assert manager.stats().sequences == 2


@pytest.mark.parametrize("row", [-1, 4, 10**6])
def test_a_handle_of_no_row_is_stale(make: Make, row: int) -> None:
    manager = make(9, 2, max_sequences=4)
    filled(manager, [1])
    for verb in (
        lambda: manager.free([Sequence(row, 0)]),
        lambda: manager.fork(Sequence(row, 0)),
        lambda: manager.reserve([Sequence(row, 0)], [1]),
    ):
        with pytest.raises(StaleSequence):
            verb()


def test_a_sequence_named_twice_is_not_freed_at_all(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2])
    with pytest.raises(InvalidInput, match="named twice"):
        manager.free([a, a])
    assert manager.lengths([a]).tolist() == [2]


def test_free_of_nothing(make: Make) -> None:
    manager = make(9, 2)
    manager.free([])
    manager.free([manager.add()])
    assert states(manager) == {"free": 8}


def test_a_shared_block_stays_until_its_last_owner_goes(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3])
    b, c = manager.fork(a, 2)
    manager.free([a])
    manager.free([b])
    assert states(manager) == {"free": 6, "open": 1, "full": 1}
    manager.free([c])
    assert states(manager) == {"free": 7, "cached": 1}


def test_sharers_freed_together_release_leaves_first(make: Make) -> None:
    manager = make(6, 1)
    a = filled(manager, [1, 2])  # blocks 1 2
    (b,) = manager.fork(a)
    run(manager, [b], [[3]])  # block 3
    run(manager, [a], [[4]])  # block 4
    manager.free([a, b])
    assert taken_next(manager, 5) == [5, 4, 3, 2, 1]


def test_a_batch_is_freed_like_a_list(make: Make) -> None:
    manager = make(9, 2)
    batch = Batch([filled(manager, [1, 2, 3]), filled(manager, [4])])
    manager.free(batch)
    assert states(manager) == {"free": 7, "cached": 1}
    with pytest.raises(StaleSequence):
        manager.reserve(batch, [1, 1])


# Truncate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "left", "after"),
    [
        (5, [1, 2, 3], {"free": 5, "open": 1, "full": 2}),
        (4, [1, 2], {"free": 6, "full": 2}),
        (3, [1, 2], {"free": 6, "full": 2}),  # into a published block: it stays whole
        (2, [1], {"free": 6, "full": 1, "cached": 1}),
        (0, [], {"free": 6, "cached": 2}),
    ],
)
def test_truncate_gives_back_whole_blocks(make: Make, length: int, left: list[int], after: dict[str, int]) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3, 4, 5])
    manager.truncate([a], [length])
    assert manager.lengths([a]).tolist() == [length]
    assert blocks(manager, a) == left
    assert states(manager) == after
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4


def test_truncate_of_a_batch(make: Make) -> None:
    manager = make(9, 2)
    a, b = filled(manager, [1, 2, 3]), filled(manager, [4, 5, 6])
    manager.truncate([b, a], [1, 3])
    assert manager.lengths([a, b]).tolist() == [3, 1]


@pytest.mark.parametrize("lengths", [[4, 0], [-1, 0], [0], [0, 0, 0], [1.5, 0], [None, 0], ["1", 0]], ids=str)
def test_truncate_refuses_lengths(make: Make, lengths: list[object]) -> None:
    manager = make(9, 2)
    both = [filled(manager, [1, 2, 3]), filled(manager, [4, 5, 6])]
    with pytest.raises(InvalidInput):
        manager.truncate(both, lengths)
    assert manager.lengths(both).tolist() == [3, 3]


def test_truncate_leaves_the_other_owner_alone(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3, 4, 5])
    (b,) = manager.fork(a)
    manager.truncate([a], [1])
    assert blocks(manager, b) == [1, 2, 3]
    assert states(manager) == {"free": 5, "open": 1, "full": 2}


# Fork ---------------------------------------------------------------------------------------------------------------


def test_fork_shares_everything(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add([1, 2, 3, 4])
    run(manager, [a], [[1, 2, 3]])
    children = manager.fork(a, 3)
    assert [blocks(manager, child) for child in children] == [[1, 2]] * 3
    assert manager.lengths(children).tolist() == [3, 3, 3]
    stats = manager.stats().device
    assert (stats.used, stats.references, stats.saved, stats.waste_slots) == (2, 8, 6, 1)
    assert len({child.row for child in [a, *children]}) == 4


def test_fork_of_an_empty_sequence_and_of_a_fork(make: Make) -> None:
    manager = make(9, 2)
    (b,) = manager.fork(manager.add())
    run(manager, [b], [[1, 2, 3]])
    (c,) = manager.fork(b)
    assert blocks(manager, c) == [1, 2]


@pytest.mark.parametrize("n", [0, -1])
def test_fork_refuses_counts(make: Make, n: int) -> None:
    manager = make(9, 2)
    with pytest.raises(InvalidInput, match=f"n must be at least 1, got {n}"):
        manager.fork(manager.add(), n)


def test_waste_is_what_the_longest_owner_leaves(make: Make) -> None:
    manager = make(9, 4, prefix_caching=False)
    a = filled(manager, [1] * 6)
    (b,) = manager.fork(a)
    manager.truncate([b], [1])
    assert manager.stats().device.waste_slots == 2
    manager.free([a])
    assert manager.stats().device.waste_slots == 3


# Fences -------------------------------------------------------------------------------------------------------------


def test_blocks_are_fenced_until_the_fence_passes(make: Make) -> None:
    manager = make(4, 2)
    gate = Gate()
    manager.free([filled(manager, [1, 2, 3])], after=gate)
    assert states(manager) == {"free": 1, "fenced": 2}
    a = manager.add()
    with pytest.raises(OutOfBlocks) as raised:
        manager.reserve([a], [4])
    assert (raised.value.requested, raised.value.available, raised.value.fenced) == (2, 1, 2)
    gate.passed = True
    assert manager.reserve([a], [4]).block_table.tolist() == [[2, 3]]
    assert states(manager) == {"open": 2, "cached": 1}


def test_blocks_wait_for_the_steps_in_flight(make: Make) -> None:
    manager = make(5, 2)
    a, b = filled(manager, [1]), manager.add()
    first, second = manager.reserve([a], [1]), manager.reserve([b], [1])
    manager.free([a])
    assert states(manager) == {"free": 2, "open": 1, "fenced": 1}
    third = manager.reserve([b], [1])  # reserved later: nobody waits for it
    manager.commit(first)
    assert states(manager) == {"free": 2, "open": 1, "fenced": 1}
    manager.commit(second)
    assert states(manager) == {"free": 3, "open": 1}
    manager.commit(third)


def test_an_older_step_is_waited_for_when_a_newer_one_is_aborted(make: Make) -> None:
    manager = make(5, 2)
    a, b = filled(manager, [1]), manager.add()
    first, second = manager.reserve([a], [1]), manager.reserve([b], [1])
    manager.free([a])
    manager.abort(second)
    assert states(manager) == {"free": 3, "fenced": 1}
    manager.commit(first)
    assert states(manager) == {"free": 4}


def test_an_aborted_step_holds_nothing_back(make: Make) -> None:
    manager = make(5, 2)
    a = filled(manager, [1])
    plan = manager.reserve([a], [1])
    manager.free([a])
    manager.abort(plan)
    assert states(manager) == {"free": 4}


def test_blocks_wait_for_all_their_fences(make: Make) -> None:
    manager = make(5, 2)
    a = filled(manager, [1])
    (b,) = manager.fork(a)
    one, two = Gate(), Gate()
    manager.free([a], after=one)
    manager.free([b], after=two)
    two.passed = True
    assert states(manager) == {"free": 3, "fenced": 1}
    one.passed = True
    assert states(manager) == {"free": 4}


def test_a_fence_outlives_its_owner_but_not_other_owners(make: Make) -> None:
    manager = make(5, 2)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    manager.free([a], after=Gate())
    assert states(manager) == {"free": 2, "open": 1, "full": 1}
    manager.truncate([b], [0])
    assert states(manager) == {"free": 2, "fenced": 2}


def test_fenced_blocks_become_evictable_when_their_fence_passes(make: Make) -> None:
    manager = make(4, 1)
    gate = Gate()
    a, b, c = (filled(manager, [token]) for token in (1, 2, 3))
    manager.free([a], after=gate)
    manager.free([b])
    gate.passed = True
    manager.free([c])  # lets go of block 1 first
    assert taken_next(manager, 3) == [2, 1, 3]


@pytest.mark.parametrize("after", [3, "event", object()], ids=["number", "text", "object"])
def test_what_is_no_fence_is_refused_at_once(make: Make, after: object) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1])
    with pytest.raises(InvalidInput, match=r"a fence needs a query\(\)"):
        manager.free([a], after=after)
    transfer = manager.swap_out([a])
    with pytest.raises(InvalidInput, match=r"a fence needs a query\(\)"):
        manager.finish(transfer, after=after)
    manager.finish(transfer)
    assert states(manager, 1) == {"free": 7, "open": 1}
