"""What a prompt is given and on what terms: collisions, keys, the watermark, the block that begins alike."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from managers import KINDS, Make, blocks, cached_tokens, copies, filled, run

from pagemgr.errors import OutOfBlocks
from pagemgr.prefix import Namespace

KIND = KINDS


@KIND
def test_a_block_that_begins_alike_is_copied_when_written(make: Make) -> None:
    manager = make(16, 4)
    a = filled(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    b = manager.add([1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert b.num_cached_tokens == 6
    assert blocks(manager, b) == blocks(manager, a)[:2]
    plan = manager.reserve([b], [[0, 0, 0]])
    assert copies(plan) == [(blocks(manager, a)[1], blocks(manager, b)[1])]
    manager.commit(plan)
    manager.check()
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6, 0, 0, 0]) == 8
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


@pytest.mark.parametrize("windows", [(None,), (None, 9)], ids=str)
@KIND
def test_a_prompt_that_fits_the_pool_fits_with_any_hit(make: Make, windows: tuple[int | None, ...]) -> None:
    """The block that begins alike cannot be evicted for the prompt's own last block."""
    manager = make(1 + 3 * len(windows), 4, windows=windows)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    assert manager.match([1, 2, 0, 0, 0]) == (2, 2)
    prompt = [1, 2, *[0] * 10]
    assert manager.match(prompt) == (0, 0)
    manager.free([filled(manager, prompt)])
    run(manager, [manager.add([1, 2, 3, 0])], [[0] * 3])
    manager.check()


@KIND
def test_a_block_begins_alike_in_its_own_namespace_only(make: Make) -> None:
    manager = make(16, 4)
    filled(manager, [1, 2, 3, 4, 5], Namespace(tenant="x"))
    assert cached_tokens(manager, [1, 2, 3, 0, 0], Namespace(tenant="x")) == 3
    assert cached_tokens(manager, [1, 2, 3, 0, 0], Namespace(adapter="x")) == 0
    assert cached_tokens(manager, [1, 2, 3, 0, 0]) == 0


@KIND
def test_what_was_evicted_is_not_found_by_its_first_token(make: Make) -> None:
    """The table of first tokens still names the block, which holds something else by now."""
    manager = make(4, 4)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    other = manager.add()
    run(manager, [other], [[1, 2, 9, 9, 9, 9, 9, 9, 9, 9]])
    manager.free([other])
    assert cached_tokens(manager, [1, 2, 3, 0]) == 2  # the other's block by now
    manager.clear()
    assert cached_tokens(manager, [1, 2, 3, 0]) == 0
    manager.check()


@KIND
def test_a_forged_place_in_the_table_of_first_tokens_is_noticed(make: Make) -> None:
    """Whoever finds two prefixes that share a place in the table gains nothing: the name decides."""
    manager = make(16, 4)
    (target,) = blocks(manager, filled(manager, [1, 2, 3, 4], Namespace(tenant="victim")))
    manager.tiers[0].index.heads[:] = target
    assert cached_tokens(manager, [1, 2, 3, 0, 0], Namespace(tenant="thief")) == 0
    assert cached_tokens(manager, [1, 2, 3, 0, 0], Namespace(tenant="victim")) == 3


class Constant:
    """A digest that does not depend on what is hashed: every block collides with every other of its place."""

    def __call__(self, parent: bytes, tokens: np.ndarray) -> bytes:
        return b"".join(hashlib.sha256(bytes([i])).digest() for i in range(len(tokens) // 2))


@pytest.mark.parametrize("verify", [False, True])
def test_a_collision_is_a_miss_and_counted(verify: bool) -> None:
    from pagemgr.manager import BlockManager

    manager = BlockManager(16, 2, verify_hits=verify, compiled=False)
    manager.tiers[0].index.hash = Constant()  # type: ignore[method-assign]
    filled(manager, [1, 2, 3, 4, 5])
    honest, forged = manager.add([1, 2, 3, 4, 9]), manager.add([1, 2, 7, 7, 9])
    assert honest.num_cached_tokens == 4
    assert forged.num_cached_tokens == (2 if verify else 4)
    assert manager.stats().counters.prefix_collisions == int(verify)


@KIND
def test_managers_with_other_secrets_give_other_names(make: Make) -> None:
    names = []
    for secret in (b"", b"0123456789abcdef", b"fedcba9876543210"):
        manager = make(8, 2, secret=secret)
        filled(manager, [1, 2, 3])
        assert cached_tokens(manager, [1, 2, 3]) == 2
        names.append(manager.tiers[0].index.names_of(np.array([1], dtype=np.int32)))
    assert len(set(names)) == 3


@KIND
def test_what_is_wanted_soon_after_its_eviction_is_counted(make: Make) -> None:
    manager = make(33, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    assert manager.stats().counters.evicted_wanted_blocks == 0
    manager.free([filled(manager, [9] * 63)])  # evicts both
    for expected in (2, 2):  # counted once
        manager.free([manager.add([1, 2, 3, 4, 5])])
        assert manager.stats().counters.evicted_wanted_blocks == expected
    manager.free([manager.add([7, 7, 7])])
    assert manager.stats().counters.evicted_wanted_blocks == 2


@KIND
def test_the_watermark_is_left_to_those_that_run(make: Make) -> None:
    manager = make(11, 2, watermark=3)
    a = filled(manager, [1] * 8)
    with pytest.raises(OutOfBlocks) as raised:
        manager.add([2] * 7)
    assert (raised.value.requested, raised.value.available, raised.value.tier) == (4, 3, "device")
    b = manager.add([2] * 6)
    run(manager, [b], [[2] * 6])
    run(manager, [a], [[1] * 6])  # those that run may have what is left
    manager.free([a, b])
    assert manager.add([1] * 9).num_cached_tokens == 8  # needs one block, as four are there
    manager.check()


@KIND
def test_hits_count_against_the_watermark_as_they_can_no_longer_be_evicted(make: Make) -> None:
    manager = make(8, 2, watermark=2)
    manager.free([filled(manager, [1] * 9)])
    assert manager.stats().device.cached == 4
    with pytest.raises(OutOfBlocks) as raised:
        manager.add([1] * 13)
    assert (raised.value.requested, raised.value.available) == (3, 1)
    a = manager.add([1] * 9)
    with pytest.raises(OutOfBlocks) as raised:
        manager.add([3, 3, 3])
    assert (raised.value.requested, raised.value.available) == (2, 1)
    manager.free([a])
    manager.add([3, 3, 3])
