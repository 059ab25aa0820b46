"""Steps as transactions: reserve, commit, abort, copy-on-write, and several in flight."""

from __future__ import annotations

import numpy as np
import pytest
from managers import KINDS, Gate, Make, blocks, cached_tokens, copies, filled, run, states

from pagemgr.errors import InvalidInput, SequenceBusy, StepOrderError

pytestmark = KINDS


def test_a_plan_says_where_tokens_go(make: Make) -> None:
    manager = make(9, 4)
    a, b = manager.add_many([[], []])
    plan = manager.reserve([a, b], [[1, 2, 3, 4, 5], [6]])
    assert plan.block_table.tolist() == [[1, 2], [3, 0]]
    assert plan.query_start.tolist() == [0, 5, 6]
    assert plan.slot_mapping.tolist() == [4, 5, 6, 7, 8, 12]
    assert plan.seq_lens.tolist() == [5, 1]
    assert plan.copies == ()
    assert (plan.block_table.dtype, plan.query_start.dtype, plan.slot_mapping.dtype) == (np.int32, np.int32, np.int64)


def test_a_plan_starts_where_the_last_one_ended(make: Make) -> None:
    manager = make(9, 4)
    a, b = manager.add_many([[], []])
    run(manager, [a, b], [[1, 2, 3], [4]])
    plan = manager.reserve([b, a], [[5], [6, 7]])
    assert plan.block_table.tolist() == [[2, 0], [1, 3]]
    assert plan.slot_mapping.tolist() == [2 * 4 + 1, 1 * 4 + 3, 3 * 4 + 0]
    assert plan.starts.tolist() == [1, 3]


def test_ids_counts_and_arrays_reserve_alike(make: Make) -> None:
    plans = []
    for tokens in ([[1, 2], [3, 4]], [2, 2], [[1, 2], 2], np.array([[1, 2], [3, 4]])):
        manager = make(9, 4)
        plans.append(manager.reserve(manager.add_many([[], []]), tokens))
    assert {tuple(plan.slot_mapping.tolist()) for plan in plans} == {(4, 5, 8, 9)}


def test_tokens_count_when_the_step_is_committed(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add()
    plan = manager.reserve([a], [[1, 2, 3]])
    assert manager.lengths([a]).tolist() == [0]
    assert cached_tokens(manager, [1, 2, 3]) == 0
    manager.commit(plan)
    assert manager.lengths([a]).tolist() == [3]
    assert cached_tokens(manager, [1, 2, 3]) == 2


def test_ids_may_come_at_commit(make: Make) -> None:
    manager = make(9, 2)
    a, b = manager.add_many([[], []])
    manager.commit(manager.reserve([a, b], [2, [3, 4]]), [[1, 2], None])
    assert cached_tokens(manager, [1, 2, 0]) == cached_tokens(manager, [3, 4, 0]) == 2


def test_ids_may_come_at_commit_as_an_array(make: Make) -> None:
    manager = make(9, 2)
    both = manager.add_many([[], []])
    manager.commit(manager.reserve(both, [2, 2]), np.array([[1, 2], [3, 4]]))
    assert cached_tokens(manager, [1, 2, 0]) == cached_tokens(manager, [3, 4, 0]) == 2


def test_several_steps_of_a_sequence_in_flight(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add()
    first, second = manager.reserve([a], [3]), manager.reserve([a], [2])
    assert second.starts.tolist() == [3]
    assert second.block_table.tolist() == [[1, 2, 3]]
    manager.commit(first, [[1, 2, 3]])
    assert manager.lengths([a]).tolist() == [3]
    manager.commit(second, [[4, 5]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4


def test_tokens_without_ids_are_never_matched_nor_what_follows(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2])
    run(manager, [a], [2])
    run(manager, [a], [[5, 6]])
    assert manager.lengths([a]).tolist() == [6]
    assert states(manager) == {"free": 5, "open": 2, "full": 1}
    assert cached_tokens(manager, [1, 2, 0, 0, 5, 6, 7]) == 2
    manager.truncate([a], [2])
    run(manager, [a], [[3, 4]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4


def test_other_tokens_than_the_prompt_announced(make: Make) -> None:
    manager = make(9, 4)
    a = manager.add([1, 2, 3, 4, 5, 6, 7, 8])
    run(manager, [a], [[1, 2, 9]])
    run(manager, [a], [[4]])
    run(manager, [a], [[5, 6, 7, 8]])
    manager.check()
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 2
    assert cached_tokens(manager, [1, 2, 9, 4, 5, 6, 7, 8, 9]) == 8


def test_two_sequences_compute_one_block_at_once(make: Make) -> None:
    manager = make(9, 2)
    a, b = manager.add_many([[1, 2, 3], [1, 2, 4]])
    plan = manager.reserve([a, b], [[1, 2, 3], [1, 2, 4]])
    assert plan.block_table.tolist() == [[1, 2], [3, 4]]
    manager.commit(plan)
    assert (blocks(manager, a), blocks(manager, b)) == ([1, 2], [1, 4])
    assert states(manager) == {"free": 5, "open": 2, "full": 1}
    assert manager.stats().counters.duplicate_blocks == 1


def test_a_duplicate_waits_for_the_steps_that_read_it(make: Make) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3])
    b = manager.add()
    first, second = manager.reserve([b], [[1, 2]]), manager.reserve([b], [[3]])
    assert second.block_table.tolist() == [[3, 4]]
    manager.commit(first)
    assert blocks(manager, b) == [1, 4]
    assert states(manager) == {"free": 4, "open": 2, "full": 1, "fenced": 1}
    manager.commit(second)
    assert states(manager) == {"free": 5, "open": 2, "full": 1}


# Copy-on-write ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_sharers_write_and_the_last_keeps_the_tail(make: Make, n: int) -> None:
    manager = make(20, 4)
    a = filled(manager, [1, 2, 3, 4, 5])
    family = [a, *manager.fork(a, n)]
    plan = manager.reserve(family, [[7]] * (n + 1))
    assert copies(plan) == [(2, 3 + i) for i in range(n)]
    assert plan.block_table.tolist() == [[1, 3 + i] for i in range(n)] + [[1, 2]]
    manager.commit(plan)
    assert states(manager) == {"free": 20 - 1 - n - 2, "open": n + 1, "full": 1}
    assert manager.stats().counters.cow_copies == n


def test_a_tail_is_copied_while_somebody_else_shares_it(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2])
    b, c = manager.fork(a, 2)
    assert copies(run(manager, [a, b], [[3], [4]])) == [(1, 2), (1, 3)]
    assert blocks(manager, c) == [1]
    assert copies(run(manager, [c], [[5]])) == []


def test_full_blocks_are_shared_without_a_copy(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3, 4])
    (b,) = manager.fork(a)
    plan = manager.reserve([a, b], [[5], [6]])
    assert plan.copies == ()
    assert plan.block_table.tolist() == [[1, 2, 3], [1, 2, 4]]


def test_the_longest_sharer_keeps_the_tail(make: Make) -> None:
    """It writes past what the others hold, so that an abort gives them back what they had."""
    manager = make(9, 4)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    manager.truncate([b], [1])
    plan = manager.reserve([a, b], [[7], [9]])
    assert copies(plan) == [(1, 2)]
    assert plan.slot_mapping.tolist() == [1 * 4 + 3, 2 * 4 + 1]
    manager.abort(plan)
    assert blocks(manager, a) == blocks(manager, b) == [1]


def test_a_tail_that_an_abort_may_give_back_is_not_written(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    manager.truncate([b], [1])
    first, second = manager.reserve([a], [[7]]), manager.reserve([b], [[9]])
    assert copies(first) == [(1, 2)]
    assert copies(second) == [(1, 3)]
    manager.abort(second)
    manager.abort(first)
    assert copies(manager.reserve([b], [[9]])) == [(1, 2)]


def test_a_tail_that_waits_for_a_fence_is_not_written(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    manager.truncate([b], [1])
    gate = Gate()
    manager.free([a], after=gate)
    assert copies(run(manager, [b], [[9]])) == [(1, 2)]
    assert states(manager) == {"free": 6, "open": 1, "fenced": 1}


def test_all_sharers_copy_a_tail_that_waits_for_a_fence(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2, 3])
    b, c = manager.fork(a, 2)
    manager.truncate([b, c], [1, 1])
    manager.free([a], after=Gate())
    assert copies(run(manager, [b, c], [[8], [9]])) == [(1, 2), (1, 3)]


def test_ids_that_come_late_are_not_lost_by_a_copy(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2])
    (b,) = manager.fork(a)
    first, second = manager.reserve([a], [1]), manager.reserve([b], [1])
    manager.abort(first)
    third = manager.reserve([b], [1])
    manager.commit(second, [[3]])
    manager.commit(third, [[4]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4
    assert cached_tokens(manager, [1, 2, 0, 4, 5]) == 2


def test_append_after_truncating_into_a_published_block(make: Make) -> None:
    manager = make(9, 4)
    a = filled(manager, [1, 2, 3, 4])
    manager.truncate([a], [2])
    plan = run(manager, [a], [[8, 9]])
    assert copies(plan) == [(1, 2)]
    assert plan.slot_mapping.tolist() == [2 * 4 + 2, 2 * 4 + 3]
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == cached_tokens(manager, [1, 2, 8, 9, 5]) == 4
    assert states(manager) == {"free": 6, "full": 1, "cached": 1}


# Abort --------------------------------------------------------------------------------------------------------------


def test_abort_gives_the_same_blocks_again(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3])
    (b,) = manager.fork(a)
    first = manager.reserve([a, b], [[1, 2, 3], [4]])
    manager.abort(first)
    assert (blocks(manager, a), blocks(manager, b)) == ([1, 2], [1, 2])
    assert manager.lengths([a, b]).tolist() == [3, 3]
    again = manager.reserve([a, b], [[1, 2, 3], [4]])
    assert again.block_table.tolist() == first.block_table.tolist()
    assert copies(again) == copies(first)


def test_abort_keeps_what_was_evicted_evicted(make: Make) -> None:
    manager = make(4, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    a = manager.add()
    manager.abort(manager.reserve([a], [4]))
    assert states(manager) == {"free": 2, "cached": 1}
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 2


def test_abort_of_a_step_whose_sequence_was_freed(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1])
    (b,) = manager.fork(a)
    plan = manager.reserve([a, b], [[2, 3], [2, 3]])
    manager.free([a])
    manager.abort(plan)
    assert blocks(manager, b) == [1]
    assert manager.lengths([b]).tolist() == [1]
    assert states(manager) == {"free": 7, "open": 1}
    manager.check()


def test_steps_of_other_sequences_may_be_aborted_first(make: Make) -> None:
    manager = make(9, 2)
    a, b = manager.add_many([[], []])
    first, second = manager.reserve([a], [1]), manager.reserve([b], [1])
    manager.abort(first)
    manager.commit(second)
    assert manager.lengths([a, b]).tolist() == [0, 1]


# Order --------------------------------------------------------------------------------------------------------------


def test_steps_commit_oldest_first_and_abort_newest_first(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add()
    first, second = manager.reserve([a], [1]), manager.reserve([a], [1])
    with pytest.raises(StepOrderError, match="step 2 cannot commit"):
        manager.commit(second)
    with pytest.raises(StepOrderError, match="step 1 cannot abort"):
        manager.abort(first)
    manager.abort(second)
    manager.commit(first)


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_step_ends_once(make: Make, end: str) -> None:
    manager = make(9, 2)
    plan = manager.reserve([manager.add()], [1])
    getattr(manager, end)(plan)
    for verb in (manager.commit, manager.abort):
        with pytest.raises(StepOrderError):
            verb(plan)


def test_a_plan_of_another_manager_is_refused(make: Make) -> None:
    manager, other = make(9, 2), make(9, 2)
    manager.reserve([manager.add()], [1])
    foreign = other.reserve([other.add()], [1])
    for verb in (manager.commit, manager.abort):
        with pytest.raises(StepOrderError):
            verb(foreign)


def test_what_steps_in_flight_forbid(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1])
    plan = manager.reserve([a], [1])
    for verb in (
        lambda: manager.fork(a),
        lambda: manager.truncate([a], [0]),
        lambda: manager.swap_out([a]),
    ):
        with pytest.raises(SequenceBusy, match="step 2 is in flight") as raised:
            verb()
        assert raised.value.row == a.row
    manager.commit(plan)
    assert len(manager.fork(a)) == 1


def test_a_freed_sequence_in_a_step_is_passed_over(make: Make) -> None:
    manager = make(9, 2)
    a, b = manager.add_many([[], []])
    plan = manager.reserve([a, b], [2, 2])
    manager.free([a])
    again = manager.add()
    assert again.row == a.row
    manager.commit(plan, [[1, 2], [3, 4]])
    assert manager.lengths([again, b]).tolist() == [0, 2]
    assert cached_tokens(manager, [1, 2, 0]) == 0
    assert cached_tokens(manager, [3, 4, 0]) == 2
    assert manager.stats().counters.tokens_committed == 2


# Input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [1],
        [1, 1, 1],
        [[1], []],
        [1, 0],
        [1, -1],
        [[1], [-1]],
        [[1], [2**31]],
        [[1], [0.5]],
        [[1], None],
        [[1], 1.5],
    ],
    ids=str,
)
def test_reserve_refuses_tokens(make: Make, tokens: list[object]) -> None:
    manager = make(9, 2)
    both = manager.add_many([[], []])
    with pytest.raises(InvalidInput):
        manager.reserve(both, tokens)
    assert states(manager) == {"free": 8}


def test_reserve_refuses_an_empty_batch_and_a_sequence_twice(make: Make) -> None:
    manager = make(9, 2)
    a = manager.add()
    with pytest.raises(InvalidInput, match="at least one new token"):
        manager.reserve([], [])
    with pytest.raises(InvalidInput, match="named twice"):
        manager.reserve([a, a], [1, 1])


@pytest.mark.parametrize(
    "late", [[], [[1], None, None], [[1, 2, 3], None], [None, [1]], [[-1, 0], None], [["a", "b"], None]]
)
def test_commit_refuses_ids(make: Make, late: list[object]) -> None:
    manager = make(9, 2)
    plan = manager.reserve(manager.add_many([[], []]), [2, [1, 2]])
    with pytest.raises(InvalidInput):
        manager.commit(plan, late)
    manager.commit(plan, [[1, 2], None])
