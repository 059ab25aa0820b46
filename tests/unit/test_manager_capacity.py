"""Where memory just suffices and where it just does not: shrinking, the smallest pools, swapped-out sequences."""

from __future__ import annotations

import pytest
from managers import KINDS, Make, blocks, cached_tokens, filled, run, states

from pagemgr.errors import OutOfBlocks, SequenceTooLong

pytestmark = KINDS


@pytest.mark.parametrize("caching", [True, False])
def test_a_sequence_shrinks_token_by_token_and_grows_again(make: Make, caching: bool) -> None:
    manager = make(9, 3, prefix_caching=caching)
    a = filled(manager, range(20))
    whole = blocks(manager, a)
    for length in range(19, -1, -1):
        manager.truncate([a], [length])
        assert blocks(manager, a) == whole[: -(-length // 3)]
        assert manager.stats().device.used == -(-length // 3)
        manager.check()
    assert states(manager) == ({"free": 2, "cached": 6} if caching else {"free": 8})
    for token in range(20):
        run(manager, [a], [[token]])
    manager.check()
    assert manager.lengths([a]).tolist() == [20]
    assert cached_tokens(manager, range(21)) == (18 if caching else 0)


def test_a_pool_of_one_block_works(make: Make) -> None:
    manager = make(2, 2)
    assert manager.max_seq_len == 2
    for token in range(5):  # each evicts what the one before left
        a = filled(manager, [token, token])
        with pytest.raises(OutOfBlocks) as raised:
            manager.reserve([manager.add()], [1])
        assert (raised.value.requested, raised.value.available) == (1, 0)
        with pytest.raises(SequenceTooLong):
            manager.reserve([a], [1])
        manager.free([a])
    assert manager.stats().device.evicted_total == 4


def test_blocks_of_one_token_work(make: Make) -> None:
    manager = make(5, 1, num_host_blocks=5)
    a = filled(manager, [7, 8, 9])
    assert cached_tokens(manager, [7, 8, 9, 9]) == 3
    manager.finish(manager.swap_out([a]))
    manager.finish(manager.swap_in([a]))
    assert blocks(manager, a) == [1, 2, 3]  # what the device still holds is not copied back


@pytest.mark.parametrize("tail", [0, 1])
def test_what_is_swapped_out_takes_no_device_memory(make: Make, tail: int) -> None:
    """As many sequences as fit are swapped out, and as many more fit; one too many is refused with the numbers."""
    manager = make(13, 2, max_sequences=16, num_host_blocks=14)
    first = [filled(manager, [n, n, n, n, n, n, n][: 5 + tail]) for n in range(4)]
    with pytest.raises(OutOfBlocks) as raised:
        filled(manager, [9])
    assert (raised.value.requested, raised.value.available, raised.value.tier) == (1, 0, "device")
    manager.finish(manager.swap_out(first))
    device = manager.stats().device
    assert (device.used, device.free + device.cached) == (0, 12)
    second = [filled(manager, [n, n, n, n, n][: 5 + tail]) for n in range(10, 14)]
    assert manager.stats().device.used == 12
    with pytest.raises(OutOfBlocks) as raised:
        manager.swap_out(second[:1])
    assert (raised.value.requested, raised.value.available, raised.value.tier) == (3, 1, "host")
    with pytest.raises(OutOfBlocks) as raised:
        manager.swap_in(first[:1])
    assert (raised.value.available, raised.value.tier) == (0, "device")
    manager.free(second)
    manager.finish(manager.swap_in(first))
    assert manager.stats().device.used == 12
    manager.check()


def test_a_move_that_is_refused_is_not_under_way(make: Make) -> None:
    """Neither tier holds anything for it, and the sequence can go on at once."""
    manager = make(4, 2, num_host_blocks=4)
    a = filled(manager, [1, 2, 3])
    manager.finish(manager.swap_out([a]))
    b = filled(manager, [5, 5, 5, 5, 5])
    before = states(manager), states(manager, 1)
    with pytest.raises(OutOfBlocks):
        manager.swap_in([a])
    assert (states(manager), states(manager, 1)) == before
    manager.truncate([a], [2])
    manager.free([b])
    manager.finish(manager.swap_in([a]))
    assert manager.lengths([a]).tolist() == [2]


def test_hits_do_not_count_as_room_for_the_rest(make: Make) -> None:
    """Blocks that a batch shares are cached no more: what they leave is what can be given out."""
    manager = make(6, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5, 6])])
    assert states(manager) == {"free": 2, "cached": 3}
    a, b = manager.add_many([[1, 2, 3, 4, 5, 6, 7], []])
    assert a.num_cached_tokens == 6
    with pytest.raises(OutOfBlocks) as raised:
        manager.reserve([a, b], [[7], 4])
    assert (raised.value.requested, raised.value.available) == (3, 2)
    assert manager.reserve([a, b], [[7], 2]).num_tokens == 3
    manager.check()


def test_consecutive_sequences_never_overlap(make: Make) -> None:
    manager = make(40, 2, max_sequences=40, prefix_caching=False)
    alive = {}
    for n in range(60):
        if len(alive) == 8:
            manager.free([alive.pop(next(iter(alive)))])
        alive[n] = filled(manager, [n] * (1 + n % 8))
        owned = [block for sequence in alive.values() for block in blocks(manager, sequence)]
        assert len(owned) == len(set(owned)) == manager.stats().device.used
