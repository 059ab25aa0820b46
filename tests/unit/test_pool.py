"""Blocks of one tier: what moves them from state to state, in which order they go, and what the pool refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from managers import Gate

from pagemgr.errors import InternalError, InvalidInput, OutOfBlocks
from pagemgr.eviction import LRU
from pagemgr.pool import BlockPool, BlockState, tally


def pool_of(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks, LRU(num_blocks), "device")


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, dtype=np.int32)


def take(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.peek(count)
    pool.take(blocks)
    return blocks.tolist()


def state(pool: BlockPool, block: int) -> str:
    return BlockState(pool.state[block]).name


def cached(pool: BlockPool, *blocks: int) -> None:
    """These open blocks become cached, in this order."""
    pool.seal(ids(*blocks))
    pool.release(ids(*blocks))


def references(pool: BlockPool, **counts: int) -> np.ndarray:
    """``b3=2``: two table entries name block 3."""
    found = np.zeros(pool.num_blocks, dtype=np.int64)
    for name, count in counts.items():
        found[int(name[1:])] = count
    return found


def test_a_new_pool_is_all_blanks_but_the_null_block() -> None:
    pool = pool_of(5)
    assert (pool.available, pool.counts[BlockState.free], pool.counts[BlockState.null]) == (4, 4, 1)
    assert take(pool, 4) == [1, 2, 3, 4]
    pool.check(references(pool, b1=1, b2=1, b3=1, b4=1))


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_pool_holds_at_least_one_block(size: int) -> None:
    with pytest.raises(InvalidInput, match=f"at least 2 blocks .* got {size}"):
        BlockPool(size, LRU(2))


def test_the_life_of_a_block() -> None:
    pool = pool_of(3)
    assert take(pool, 1) == [1]
    assert state(pool, 1) == "open"
    pool.seal(ids(1))
    assert state(pool, 1) == "full"
    pool.release(ids(1))
    assert state(pool, 1) == "cached"
    pool.acquire(ids(1), 2)
    assert state(pool, 1) == "full"
    gate = Gate()
    pool.release(ids(1), 2, (gate,))
    assert state(pool, 1) == "fenced"
    pool.poll()
    assert state(pool, 1) == "fenced"
    gate.passed = True
    pool.poll()
    assert state(pool, 1) == "cached"
    assert take(pool, 2) == [2, 1]
    assert state(pool, 1) == "open"
    pool.release(ids(1))
    assert state(pool, 1) == "free"
    pool.check(references(pool, b2=1))
    assert (pool.num_allocated, pool.num_released, pool.num_evicted) == (3, 3, 1)


def test_a_fenced_block_comes_back_by_a_reference() -> None:
    pool = pool_of(4)
    take(pool, 2)
    pool.seal(ids(2))
    pool.release(ids(1, 2), 1, (Gate(),))
    pool.acquire(ids(1, 2))
    assert (state(pool, 1), state(pool, 2)) == ("open", "full")
    pool.release(ids(1, 2))
    assert (state(pool, 1), state(pool, 2)) == ("fenced", "fenced")
    pool.check(references(pool))


def test_peek_changes_nothing_and_take_gives_the_same() -> None:
    pool = pool_of(6)
    take(pool, 3)
    cached(pool, 2, 1)
    expected = [4, 5, 2, 1]
    assert pool.peek(4).tolist() == pool.peek(4).tolist() == expected
    assert pool.peek(0).tolist() == []
    assert pool.take(pool.peek(4)).tolist() == [2, 1]


def test_blanks_are_a_stack() -> None:
    pool = pool_of(6)
    take(pool, 3)
    pool.release(ids(3, 1))
    assert take(pool, 4) == [1, 3, 4, 5]


def test_too_much_is_refused_with_the_numbers() -> None:
    pool = pool_of(6)
    take(pool, 4)
    cached(pool, 1)
    pool.release(ids(2), 1, (Gate(),))
    with pytest.raises(OutOfBlocks) as raised:
        pool.peek(3)
    error = raised.value
    assert (error.requested, error.available, error.fenced, error.tier) == (3, 2, 1, "device")
    assert "3 device blocks requested, 2 available (1 more are fenced)" in str(error)


def test_spared_blocks_are_passed_over() -> None:
    pool = pool_of(6)
    take(pool, 5)
    cached(pool, 1, 2, 3)
    assert pool.peek(2, sparing=ids(1)).tolist() == [2, 3]
    assert pool.peek(1, sparing=ids(4, 2)).tolist() == [1]  # block 4 is not cached: nothing to spare
    with pytest.raises(OutOfBlocks) as raised:
        pool.peek(2, sparing=ids(1, 3))
    assert (raised.value.requested, raised.value.available) == (2, 1)


@pytest.mark.parametrize("offer", [[1], [4, 4], [5, 5], []], ids=str)
def test_a_policy_that_offers_what_is_not_cached(offer: list[int]) -> None:
    pool = pool_of(6)
    take(pool, 5)
    cached(pool, 1, 2)
    pool.policy.victims = lambda count: ids(*offer)  # type: ignore[method-assign]
    with pytest.raises(InternalError, match="LRU offered blocks that cannot be evicted"):
        pool.peek(2)


# Refusals -----------------------------------------------------------------------------------------------------------


def _counts(pool: BlockPool) -> tuple[list[int], bytes, bytes]:
    return list(pool.counts), pool.refs.tobytes(), pool.state.tobytes()


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda pool: pool.release(ids(1, 3)), "double free of device blocks \\[3\\]"),
        (lambda pool: pool.release(ids(1), 2), "double free of device blocks \\[1\\]"),
        (lambda pool: pool.release(ids(2)), "double free of device blocks \\[2\\]"),
        (lambda pool: pool.release(ids(0)), "double free of device blocks \\[0\\]"),
        (lambda pool: pool.release(ids(1, 3), 1, (Gate(),)), "double free"),
        (lambda pool: pool.acquire(ids(1, 3)), "hold nothing: \\[3\\]"),
        (lambda pool: pool.acquire(ids(2, 0)), "hold nothing: \\[0\\]"),
        (lambda pool: pool.seal(ids(1, 2)), "only open blocks can be sealed"),
        (lambda pool: pool.seal(ids(3)), "only open blocks can be sealed"),
    ],
)
def test_the_pool_refuses_before_anything_changes(verb: Callable[[BlockPool], None], message: str) -> None:
    pool = pool_of(4)  # 1 is open, 2 cached, 3 free
    take(pool, 2)
    cached(pool, 2)
    before = _counts(pool)
    with pytest.raises(InternalError, match=message):
        verb(pool)
    assert _counts(pool) == before
    pool.check(references(pool, b1=1))


@pytest.mark.parametrize("times", [3, np.array([1, 3])], ids=["all", "each"])
def test_references_do_not_overflow(times: int | np.ndarray) -> None:
    pool = pool_of(4)
    take(pool, 2)
    pool.refs[2] = 2**31 - 3
    before = _counts(pool)
    with pytest.raises(InternalError, match=r"more than 2147483647 references to device blocks \[2\]"):
        pool.acquire(ids(1, 2), times)
    assert _counts(pool) == before
    pool.acquire(ids(1, 2), 2)
    assert pool.refs[2] == 2**31 - 1


def test_only_an_unfenced_open_block_of_one_owner_is_writable() -> None:
    pool = pool_of(8)
    take(pool, 6)
    pool.acquire(ids(2))
    pool.seal(ids(3))
    pool.acquire(ids(4))
    pool.release(ids(4), 1, (Gate(),))
    pool.release(ids(5))
    assert pool.writable(ids(1, 2, 3, 4, 5, 6)).tolist() == [True, False, False, False, False, True]


# Fences -------------------------------------------------------------------------------------------------------------


def test_a_block_waits_for_every_fence_of_every_release() -> None:
    pool = pool_of(3)
    take(pool, 1)
    pool.acquire(ids(1), 2)
    gates = [Gate(), Gate(), Gate()]
    pool.release(ids(1), 1, (gates[0], gates[1]))
    pool.release(ids(1), 1, (gates[2],))
    pool.release(ids(1))
    for gate in gates:
        assert state(pool, 1) == "fenced"
        gate.passed = True
        pool.poll()
    assert state(pool, 1) == "free"


def test_fences_let_go_in_the_order_of_release() -> None:
    pool = pool_of(5)
    take(pool, 4)
    pool.seal(ids(1, 2, 3, 4))
    gate = Gate()
    pool.release(ids(2, 1), 1, (gate,))
    pool.release(ids(4, 3), 1, (gate,))
    gate.passed = True
    pool.poll()
    assert pool.policy.victims(4).tolist() == [2, 1, 4, 3]


def test_a_fence_that_raises_changes_nothing() -> None:
    class Broken:
        def query(self) -> bool:
            raise RuntimeError("device lost")

    pool = pool_of(4)
    take(pool, 2)
    gate = Gate()
    pool.release(ids(1), 1, (gate,))
    pool.release(ids(2), 1, (Broken(),))
    gate.passed = True
    before = _counts(pool)
    with pytest.raises(RuntimeError, match="device lost"):
        pool.poll()
    assert _counts(pool) == before
    assert pool.has_fences


# Check --------------------------------------------------------------------------------------------------------------


def _break(name: str, index: int, value: int) -> Callable[[BlockPool], None]:
    return lambda pool: getattr(pool, name).__setitem__(index, value)


@pytest.mark.parametrize(
    ("breakage", "law"),
    [
        (_break("counts", BlockState.free, 9), "counts by state"),
        (_break("state", 0, BlockState.open), "counts by state"),
        (_break("refs", 1, 2), "references equal table entries"),
        (_break("refs", 2, 1), "references equal table entries"),
        (_break("stack", 0, 1), "free stack"),
        (_break("published", 2, False), "full and cached are published"),
        (_break("published", 1, True), "free and open are not"),
        (_break("pending", 4, 2), "pending counts fences"),
        (lambda pool: pool.policy.hit(ids(2)), "the policy holds the cached blocks"),
        (lambda pool: pool._fences.clear(), "pending counts fences"),
    ],
)
def test_check_names_the_broken_law(breakage: Callable[[BlockPool], None], law: str) -> None:
    pool = pool_of(7)  # 1 is open, 2 cached, 3 full, 4 fenced, 5 and 6 free
    take(pool, 4)
    cached(pool, 2)
    pool.seal(ids(3))
    pool.release(ids(4), 1, (Gate(),))
    pool.check(references(pool, b1=1, b3=1))
    breakage(pool)
    with pytest.raises(InternalError, match=f"device pool: broken invariant: .*{law}"):
        pool.check(references(pool, b1=1, b3=1))


def test_tally_orders_by_the_last_mention() -> None:
    distinct, mentions = tally(ids(3, 1, 2, 1, 5, 3))
    assert distinct.tolist() == [2, 1, 5, 3]
    assert mentions.tolist() == [1, 2, 1, 2]
    assert [part.tolist() for part in tally(ids())] == [[], []]
