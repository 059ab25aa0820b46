"""The host tier as a second-level cache: what goes down, what comes up, and what is left where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from managers import KINDS, Gate, Make, filled, run, states

from pagemgr.errors import InvalidInput, OutOfBlocks, SequenceBusy, StaleSequence, StepOrderError
from pagemgr.manager import BlockManager
from pagemgr.plan import Promotion

pytestmark = KINDS
PROMPT = [1, 2, 3, 4, 5, 6, 7]


def evicted(make: Make, host_cache: str = "inclusive", host: int = 9, **options: Any) -> BlockManager:
    """A manager whose device has evicted the three whole blocks of ``PROMPT``."""
    manager = make(5, 2, num_host_blocks=host, host_cache=host_cache, **options)
    manager.free([filled(manager, PROMPT)])
    other = manager.add()
    plan = manager.reserve([other], [[8] * 8])
    assert [(c.source, c.target) for c in plan.copies] == [("device", "host")]
    manager.commit(plan)
    manager.free([other])
    return manager


def admitted(manager: BlockManager, prompt: list[int] = PROMPT) -> tuple[Any, Promotion]:
    (sequence,), promotion = manager.admit([prompt])
    assert promotion is not None
    return sequence, promotion


def test_what_is_evicted_goes_down_once(make: Make) -> None:
    manager = evicted(make)
    assert states(manager, 1) == {"free": 5, "cached": 3}
    assert manager.stats().counters.demoted_blocks == 3
    assert manager.match(PROMPT) == (0, 6)


@pytest.mark.parametrize(("host_cache", "left"), [("inclusive", 3 + 3), ("exclusive", 0 + 3)])
def test_a_prompt_brings_it_up(make: Make, host_cache: str, left: int) -> None:
    manager = evicted(make, host_cache)
    sequence, promotion = admitted(manager)
    assert sequence.num_cached_tokens == 6
    down, up = promotion.copies
    assert (down.source, down.target, len(down.pairs)) == ("device", "host", 3)  # what it evicts goes down first
    assert (up.source, up.target, len(up.pairs)) == ("host", "device", 3)
    assert not set(down.pairs[:, 1].tolist()) & set(up.pairs[:, 0].tolist())
    assert manager.tiers[1].index.tokens[up.pairs[:, 0]].tolist() == [[1, 2], [3, 4], [5, 6]]  # side by side above
    for call in (lambda: manager.free([sequence]), lambda: manager.reserve([sequence], [1])):
        with pytest.raises(SequenceBusy):
            call()
    manager.check()
    manager.finish(promotion)
    manager.check()
    counters = manager.stats().counters
    assert (counters.prefix_hit_tokens, counters.prefix_host_hit_tokens, counters.promoted_blocks) == (6, 6, 3)
    assert manager.stats().tiers[1].cached == left
    run(manager, [sequence], [[7]])
    assert manager.match(PROMPT)[0] == 6
    with pytest.raises(StepOrderError):
        manager.finish(promotion)


def test_hits_below_are_counted_by_the_group_that_needs_most(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=17, host_cache="inclusive", windows=(None, 3))
    manager.free([filled(manager, PROMPT)])
    other = manager.add()
    run(manager, [other], [8])
    manager.free([other])
    _, promotion = admitted(manager)
    assert promotion.num_copied == 3 + 1
    assert manager.stats().counters.prefix_host_hit_tokens == 6


def test_a_hit_below_and_a_block_that_begins_alike_leave_room_for_the_prompt(make: Make) -> None:
    manager = make(5, 2, num_host_blocks=9, host_cache="inclusive", windows=(3,), rollback=0)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])  # its first block left the window, and goes first
    other = manager.add()
    run(manager, [other], [6])
    manager.free([other])
    assert manager.match([1, 2, 3, 9]) == (0, 3)
    prompt = [1, 2, 3, 9, 9, 9, 9, 9]
    assert manager.match(prompt) == (0, 2)  # five blocks would be needed at once
    sequence, promotion = admitted(manager, prompt)
    manager.finish(promotion)
    run(manager, [sequence], [prompt[2:]])
    manager.check()


def test_what_came_up_is_not_copied_down_again(make: Make) -> None:
    manager = evicted(make)
    sequence, promotion = admitted(manager)
    manager.finish(promotion)
    manager.free([sequence])
    plan = manager.reserve([manager.add()], [8])
    assert manager.match(PROMPT) == (0, 6)  # evicted, and still below
    (down,) = plan.copies
    assert manager.tiers[1].index.tokens[down.pairs[:, 1]].tolist() == [[8, 8]]


def test_what_comes_up_does_not_evict_what_is_there_of_the_prompt(make: Make) -> None:
    manager = make(5, 2, num_host_blocks=9, host_cache="inclusive")
    manager.free([filled(manager, PROMPT)])
    other = manager.add()
    run(manager, [other], [[8] * 6])  # evicts two of the prompt's, and is released after the one that is left
    manager.free([other])
    assert manager.match(PROMPT) == (2, 6)
    sequence, promotion = admitted(manager)
    manager.finish(promotion)
    manager.check()
    assert len(set(manager.table.held(sequence.row).tolist())) == 3
    assert manager.match(PROMPT)[0] == 6


@pytest.mark.parametrize("host_cache", ["inclusive", "exclusive"])
def test_a_cancelled_promotion_ends_its_sequences_and_loses_nothing(make: Make, host_cache: str) -> None:
    manager = evicted(make, host_cache)
    sequence, promotion = admitted(manager)
    manager.cancel(promotion)
    manager.check()
    with pytest.raises(StaleSequence):
        manager.lengths([sequence])
    assert manager.match(PROMPT) == (0, 6)
    assert manager.stats().counters.promotion_failures == 1


def test_two_prompts_bring_a_block_up_once(make: Make) -> None:
    manager = evicted(make)
    sequences, promotion = manager.admit([PROMPT, [*PROMPT[:4], 9, 9]])
    assert promotion is not None
    assert promotion.num_copied == 3
    manager.finish(promotion)
    manager.check()
    assert [sequence.num_cached_tokens for sequence in sequences] == [6, 4]
    assert manager.stats().device.used == 3


def test_without_room_the_devices_own_hits_are_taken(make: Make) -> None:
    manager = evicted(make)
    busy = manager.add()
    run(manager, [busy], [6])
    (sequence,), promotion = manager.admit([PROMPT])
    assert (sequence.num_cached_tokens, promotion) == (0, None)
    manager.check()


def test_a_step_that_is_aborted_sends_nothing_down(make: Make) -> None:
    manager = make(5, 2, num_host_blocks=9, host_cache="inclusive")
    manager.free([filled(manager, PROMPT)])
    other = manager.add()
    plan = manager.reserve([other], [8])
    assert states(manager, 1) == {"free": 5, "open": 3}
    manager.check()
    manager.abort(plan)
    assert states(manager, 1) == {"free": 8}
    assert manager.match(PROMPT) == (0, 0)  # the device evicted it, and nobody knows whether it was copied
    manager.check()


def test_swapped_sequences_are_never_given_up_for_the_cache(make: Make) -> None:
    manager = make(5, 2, num_host_blocks=5, host_cache="inclusive")
    swapped = filled(manager, [7, 7, 7, 7, 7])
    manager.finish(manager.swap_out([swapped]))
    manager.clear()
    manager.free([filled(manager, PROMPT)])
    other = manager.add()
    run(manager, [other], [8])  # evicts three blocks, and there is room for one of them
    assert states(manager, 1) == {"full": 2, "open": 1, "cached": 1}
    assert manager.match(PROMPT)[1] == 2  # the one wanted first: it was released last
    manager.free([other])
    manager.finish(manager.swap_in([swapped]))
    assert manager.lengths([swapped]).tolist() == [5]
    manager.check()


def test_a_full_host_is_reported_before_anything_moves(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=3, host_cache="exclusive")
    a = filled(manager, PROMPT)
    with pytest.raises(OutOfBlocks) as raised:
        manager.swap_out([a])
    assert (raised.value.requested, raised.value.available, raised.value.tier) == (4, 2, "host")
    assert manager.lengths([a]).tolist() == [7]
    manager.check()


def test_exclusive_holds_each_prefix_in_one_tier(make: Make) -> None:
    manager = evicted(make, "exclusive")
    gate = Gate()
    sequence, promotion = admitted(manager)
    manager.finish(promotion, after=gate)
    assert manager.stats().tiers[1].fenced == 3  # the copies may still read them
    gate.passed = True
    manager.free([sequence])
    device, host = (
        {tier.index.names_of(np.array([block], dtype=np.int32)) for block in np.flatnonzero(tier.pool.published)}
        for tier in manager.tiers
    )
    assert not device & host
    assert device | host
    manager.check()


def test_exclusive_takes_nothing_from_who_was_swapped_out(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9, host_cache="exclusive")
    swapped = filled(manager, PROMPT)
    manager.finish(manager.swap_out([swapped]))
    manager.clear()
    _, promotion = admitted(manager)
    manager.finish(promotion)
    manager.check()
    assert manager.stats().tiers[1].full == 3
    manager.finish(manager.swap_in([swapped]))
    assert manager.lengths([swapped]).tolist() == [7]
    manager.check()


@pytest.mark.parametrize(("host_cache", "left"), [("off", 3), ("inclusive", 3), ("exclusive", 0)])
def test_what_is_swapped_in_stays_below_unless_exclusive(make: Make, host_cache: str, left: int) -> None:
    manager = make(9, 2, num_host_blocks=9, host_cache=host_cache)
    sequence = filled(manager, PROMPT)
    manager.finish(manager.swap_out([sequence]))
    manager.finish(manager.swap_in([sequence]))
    assert manager.stats().tiers[1].cached == left
    manager.check()


def test_a_host_cache_needs_a_host(make: Make) -> None:
    with pytest.raises(InvalidInput, match="needs host blocks"):
        make(5, 2, host_cache="inclusive")
    with pytest.raises(InvalidInput, match="one of off, inclusive, exclusive"):
        make(5, 2, num_host_blocks=5, host_cache="both")
