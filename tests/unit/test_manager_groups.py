"""Layer groups: rows of one sequence side by side, windows that let go, and hits that every group can serve."""

from __future__ import annotations

import numpy as np
import pytest
from managers import KINDS, Make, cached_tokens, filled, run, states

from pagemgr.errors import InvalidInput, StaleSequence
from pagemgr.layout import group_layers
from pagemgr.manager import BlockManager
from pagemgr.sequences import Batch, Sequence

pytestmark = KINDS
GEMMA3 = [512, 512, 512, 512, 512, None] * 3


def held(manager: BlockManager, sequence: Sequence) -> list[list[int]]:
    """Blocks by group."""
    rows = manager.table.rows([sequence])
    return [manager.table.held(row).tolist() for row in rows.tolist()]


def test_a_gemma_3_sequence_holds_a_quarter(make: Make) -> None:
    groups = group_layers(GEMMA3)
    manager = make(6 * 520, 16, windows=tuple(group.window for group in groups), rollback=0)
    sequence = manager.add()
    for _ in range(16):
        run(manager, [sequence], [np.arange(512)])
    used = manager.stats().device.used
    assert used == 512 + 5 * 32  # 32 blocks hold 511 tokens before the next one
    assert used <= 0.25 * 6 * 512
    manager.check()


def test_blocks_leave_the_window_while_the_sequence_runs(make: Make) -> None:
    manager = make(64, 4, windows=(None, 6), rollback=0, prefix_caching=False)
    sequence = manager.add()
    counts = []
    for _ in range(20):
        run(manager, [sequence], [[7]])
        counts.append([len(blocks) for blocks in held(manager, sequence)])
    assert counts[-1] == [5, 2]
    assert max(window for _, window in counts) == 2  # the 5 tokens that the next one sees besides itself
    stats = manager.stats().device
    assert stats.used == 7
    assert stats.used + stats.free + 1 == 64


def test_what_leaves_waits_for_the_steps_in_flight_and_goes_leaf_first(make: Make) -> None:
    manager = make(32, 2, windows=(3,), rollback=0)
    a, b = manager.add(), manager.add()
    plan = manager.reserve([a], [[1, 2, 3, 4, 5, 6, 7, 8]])
    later = manager.reserve([b], [1])
    manager.commit(plan)
    assert states(manager) == {"free": 26, "open": 1, "full": 1, "fenced": 3}
    manager.commit(later)
    assert states(manager)["cached"] == 3
    device = manager.tiers[0]
    assert device.index.tokens[device.pool.policy.victims(3)].tolist() == [[5, 6], [3, 4], [1, 2]]


def test_rollback_keeps_what_a_shorter_sequence_sees(make: Make) -> None:
    manager = make(64, 4, windows=(6,), rollback=5)
    sequence = filled(manager, range(1, 31))
    manager.truncate([sequence], [25])
    assert manager.lengths([sequence]).tolist() == [25]
    row = manager.table.rows([sequence])[0]
    assert manager.table.dropped[row] * 4 <= 25 - 6 + 1
    with pytest.raises(InvalidInput, match="length 12 is less than 25"):
        manager.truncate([sequence], [12])


def test_names_go_on_after_their_parents_left(make: Make) -> None:
    manager = make(64, 2, windows=(3, None), rollback=0)
    tokens = list(range(1, 14))
    a = filled(manager, tokens[:5])
    for token in tokens[5:]:
        run(manager, [a], [[token]])
    assert manager.table.dropped[manager.table.rows([a])].tolist() == [5, 0]
    manager.free([a])
    manager.check()
    assert cached_tokens(manager, [*tokens, 99]) == 12


def test_a_hit_in_one_group_alone_is_none(make: Make) -> None:
    """The window's last blocks are evicted, those of full attention are not."""
    manager = make(30, 2, windows=(None, 3), rollback=0)
    tokens = list(range(1, 12))
    manager.free([filled(manager, tokens)])
    assert cached_tokens(manager, tokens) == 10
    device = manager.tiers[0]
    names = device.index.names_of(device.pool.policy.victims(device.pool.counts[4]))
    window = [
        block for block in range(30) if device.pool.published[block] and block not in device.index.find(names[:0])
    ]
    last = [b for b in window if device.index.tokens[b].tolist() in ([7, 8], [9, 10])]
    of_window = [b for b in last if device.index.parents[b] == 0]
    assert len(of_window) == 2
    device.retract(np.array(of_window, dtype=np.int32), "cleared")
    manager.check()
    assert cached_tokens(manager, tokens) == 6  # where the window still has the block before


def test_a_window_needs_no_more_than_it_sees(make: Make) -> None:
    manager = make(64, 2, windows=(None, 4), rollback=0)
    tokens = list(range(1, 22))
    manager.free([filled(manager, tokens)])
    sequence = manager.add(tokens)
    assert sequence.num_cached_tokens == 20
    full, window = held(manager, sequence)
    assert (len(full), len(window)) == (10, 2)
    run(manager, [sequence], [tokens[20:]])
    manager.check()


def test_groups_never_share_a_block(make: Make) -> None:
    manager = make(64, 2, windows=(None, None, 9))
    a = filled(manager, [1, 2, 3, 4, 5])
    blocks = [block for group in held(manager, a) for block in group]
    assert len(set(blocks)) == len(blocks) == 9
    b = manager.add([1, 2, 3, 4, 9])
    assert [group[:2] for group in held(manager, b)] == [group[:2] for group in held(manager, a)]


def test_a_plan_has_the_batch_once_for_each_group(make: Make) -> None:
    manager = make(64, 2, windows=(None, 9))
    a, b = manager.add(), manager.add()
    plan = manager.reserve([a, b], [[1, 2, 3], 2])
    assert (plan.num_groups, plan.num_seqs, plan.num_tokens) == (2, 2, 5)
    assert plan.seq_lens.tolist() == [3, 2]
    tables = plan.block_table.reshape(2, 2, -1)
    slots = plan.slot_mapping.reshape(2, 5)
    for group in (0, 1):
        expected = [tables[group, 0, at // 2] * 2 + at % 2 for at in range(3)]
        expected += [tables[group, 1, at // 2] * 2 + at % 2 for at in range(2)]
        assert slots[group].tolist() == expected
    manager.commit(plan, [None, [8, 9]])
    assert manager.stats().counters.tokens_committed == 5
    assert manager.stats().sequences == manager.stats().device.sequences == 2


def test_handles_of_another_manager_are_stale(make: Make) -> None:
    """A row beyond the last sequence is the row of another group, and must not pass for one."""
    manager = make(64, 2, windows=(None, 9), max_sequences=2)
    manager.add()
    for stranger in (Sequence(2, 0), Sequence(3, 0), Sequence(-1, 0)):
        for call in (lambda one: manager.free([one]), lambda one: manager.reserve(Batch([one]), [1])):
            with pytest.raises(StaleSequence):
                call(stranger)
    manager.check()


@pytest.mark.parametrize("windows", [(), (0,), (None, -1), (None,) * 257])
def test_windows_that_cannot_be(make: Make, windows: tuple[int | None, ...]) -> None:
    with pytest.raises(InvalidInput, match="windows"):
        make(9, 2, windows=windows)
