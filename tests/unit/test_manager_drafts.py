"""Speculative decoding: drafts are reserved and run, what was accepted counts, the rest was never there."""

from __future__ import annotations

import pytest
from managers import KINDS, Gate, Make, blocks, cached_tokens, filled, run, states

from pagemgr.errors import InvalidInput, SequenceBusy

pytestmark = KINDS


def test_what_is_refused_was_never_there(make: Make) -> None:
    manager = make(16, 2)
    a, b = filled(manager, [1, 2, 3]), filled(manager, [7])
    plan = manager.reserve([a, b], [[4, 5, 6, 7], [8, 9]])
    manager.commit(plan, accepted=[2, 2])
    assert manager.lengths([a, b]).tolist() == [5, 3]
    assert len(blocks(manager, a)) == 3
    table = manager.table
    assert table.reserved[a.row] == table.computed[a.row] == table.committed[a.row] == 5
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 4  # block 3 holds 5, and a 6 that does not count
    run(manager, [a], [[9]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 9, 0]) == 6
    counters = manager.stats().counters
    assert (counters.draft_tokens, counters.tokens_committed) == (2, 4 + 4 + 1)
    manager.check()


def test_refused_tokens_are_counted_once_however_many_layer_groups_there_are(make: Make) -> None:
    manager = make(16, 2, windows=(None, 5))
    manager.commit(manager.reserve([manager.add()], [[1, 2, 3]]), accepted=[1])
    assert (manager.stats().counters.draft_tokens, manager.stats().counters.tokens_committed) == (2, 1)


def test_ids_may_come_with_the_verdict(make: Make) -> None:
    manager = make(16, 2)
    a = filled(manager, [1, 2, 3])
    plan = manager.reserve([a], [4])
    manager.commit(plan, [[4, 5, 6, 7]], accepted=[1])
    assert manager.lengths([a]).tolist() == [4]
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6]) == 4


def test_a_window_leaves_by_what_was_accepted(make: Make) -> None:
    """Blocks that only refused drafts would have pushed out of the window stay: the next token reads them."""
    manager = make(32, 2, windows=(4,), rollback=0)
    a = filled(manager, [1, 2, 3, 4])
    plan = manager.reserve([a], [[5, 6, 7, 8, 9, 10]])
    manager.commit(plan, accepted=[1])
    row = manager.table.rows([a])[0]
    assert manager.table.dropped[row] == 1  # token 5 sees tokens 2 to 5 at positions 2 to 4 and its own
    manager.check()


@pytest.mark.parametrize("accepted", [[0, 1], [3, 1], [1], [1, 1, 1], [-1, 1]])
def test_verdicts_that_cannot_be(make: Make, accepted: list[int]) -> None:
    manager = make(16, 2)
    a, b = manager.add(), manager.add()
    plan = manager.reserve([a, b], [[1, 2], [3, 4]])
    with pytest.raises(InvalidInput):
        manager.commit(plan, accepted=accepted)
    manager.commit(plan, accepted=[2, 1])
    assert manager.lengths([a, b]).tolist() == [2, 1]


def test_nothing_can_be_refused_that_a_later_step_builds_on(make: Make) -> None:
    manager = make(16, 2)
    a, b = manager.add(), manager.add()
    first = manager.reserve([a, b], [[1, 2], [3, 4]])
    second = manager.reserve([a], [[5]])
    with pytest.raises(SequenceBusy):
        manager.commit(first, accepted=[1, 2])
    manager.commit(first, accepted=[2, 1])
    manager.commit(second)
    assert manager.lengths([a, b]).tolist() == [3, 1]
    manager.check()


def test_refused_blocks_wait_for_the_steps_in_flight(make: Make) -> None:
    manager = make(16, 2)
    a, b = manager.add(), manager.add()
    drafts = manager.reserve([a], [[1, 2, 3, 4, 5]])
    other = manager.reserve([b], [[1]])
    manager.commit(drafts, accepted=[1])
    assert states(manager) == {"free": 11, "open": 2, "fenced": 2}
    manager.commit(other)
    assert states(manager)["free"] == 13


def test_a_freed_sequence_is_passed_over(make: Make) -> None:
    manager = make(16, 2)
    a, b = manager.add(), manager.add()
    plan = manager.reserve([a, b], [[1, 2, 3], [4, 5, 6]])
    manager.free([a], after=Gate())
    manager.commit(plan, accepted=[1, 2])
    assert manager.lengths([b]).tolist() == [2]
    manager.check()
