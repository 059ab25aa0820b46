"""Debug levels: what each notices that the one below does not, and what it says about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagemgr.cache import PagedKVCache
from pagemgr.config import Config, DebugConfig, ModelConfig, PoolConfig
from pagemgr.errors import ConfigError, InternalError, InvalidInput
from pagemgr.manager import BlockManager


def cache(level: int, **pool: int) -> PagedKVCache:
    model = ModelConfig(num_layers=2, num_kv_heads=1, head_dim=8)
    sizes = PoolConfig(block_size=2, **({"num_blocks": 9} | pool))  # type: ignore[arg-type]
    return PagedKVCache(Config(model=model, pool=sizes, backend="torch", device="cpu", debug=DebugConfig(level=level)))


def run(held: PagedKVCache, tokens: list[int]) -> list[int]:
    """A sequence comes, runs and goes; returns its blocks."""
    sequence = held.add(tokens)
    with held.step([sequence], [tokens[sequence.num_cached_tokens :]]) as step:
        new = torch.ones(step.plan.num_tokens, 1, 8)
        for layer in range(2):
            step.attention(layer, new, new, new)
        step.commit()
    blocks: list[int] = held.manager.table.held(sequence.row).tolist()
    held.free([sequence])
    return blocks


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_nothing_is_noticed_where_nothing_is_wrong(level: int) -> None:
    held = cache(level, host_blocks=5)
    for token in range(30):
        run(held, [token % 7] * (1 + token % 5))
        sequence = held.add([token, 1, 2])
        with held.step([sequence], [[token, 1, 2][sequence.num_cached_tokens :]]) as step:
            step.commit()
        held.swap_out([sequence])
        held.swap_in([sequence])
        held.free([sequence])
    held.manager.check()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_write_after_the_free_is_noticed_from_level_2(level: int) -> None:
    held = cache(level, num_blocks=3)
    run(held, [1, 1, 1])
    held.clear()
    step = held.step([held.add()], [[5]])  # both blocks are poisoned by now, and one is given out
    block = 3 - int(step.plan.block_table[0, 0])
    step.abort()
    held.storage.layers[1].value[block, 0, 1, 3] = 4.0
    sequence = held.add()
    if level == 1:
        held.step([sequence], [[1, 2, 3]]).abort()
        return
    with pytest.raises(InternalError, match=f"block {block} of device was written after it was freed") as raised:
        held.step([sequence], [[1, 2, 3]])
    assert (f"block {block}: released at {__file__}" in str(raised.value)) == (level == 3)
    assert held.manager.stats().steps_in_flight == 0  # the step was taken back
    held.manager.check()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_given_out_before_it_was_poisoned_is_left_alone(compiled: bool) -> None:
    manager = BlockManager(3, 2, debug=2, compiled=compiled)
    sequence = manager.add()
    manager.commit(manager.reserve([sequence], [1]))
    manager.free([sequence])
    plan = manager.reserve([manager.add()], [1])
    watch = manager.tiers[0].pool.watch
    assert watch is not None
    assert plan.block_table.tolist() == [[1]]
    assert (watch.to_poison(), watch.to_inspect()) == ([], [])
    manager.abort(plan)
    assert watch.to_poison() == [1]


@pytest.mark.parametrize("level", [2, 3])
def test_a_write_to_the_null_block_is_noticed(level: int) -> None:
    held = cache(level)
    held.storage.layers[0].key[0, 0] = 1.0
    with pytest.raises(InternalError, match="the null block of device was written"):
        held.step([held.add()], [[1]])


def test_level_3_reuses_a_block_as_late_as_can_be() -> None:
    order = {level: [run(cached, [n])[0] for n in range(8)] for level in (1, 3) for cached in [cache(level)]}
    assert order[1] == [1] * 8
    assert order[3] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_level_3_puts_all_of_what_is_freed_at_once_behind_the_rest() -> None:
    manager = BlockManager(6, 2, debug=3)
    sequence = manager.add()
    manager.commit(manager.reserve([sequence], [3]))
    manager.free([sequence])
    assert manager.reserve([manager.add()], [6]).block_table.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_double_free_is_refused_from_level_1_and_told_from_level_3(level: int) -> None:
    manager = BlockManager(9, 2, debug=level, compiled=False)
    sequence = manager.add()
    manager.commit(manager.reserve([sequence], [[1]]))
    pool, block = manager.tiers[0].pool, np.array([1], dtype=np.int32)
    pool.release(block)
    if level == 0:
        pool.release(block)
        assert pool.refs[1] == -1  # check() finds it, in its own time
        with pytest.raises(InternalError):
            manager.check()
        return
    with pytest.raises(InternalError, match=r"double free of device blocks \[1\]") as raised:
        pool.release(block)
    told = str(raised.value)
    assert (f"block 1: given out at {__file__}" in told) == (level == 3)


def test_levels_there_are_not() -> None:
    with pytest.raises(InvalidInput, match="debug must be from 0 to 3, got 4"):
        BlockManager(9, 2, debug=4)
    with pytest.raises(ConfigError, match="level = 4: must be"):
        DebugConfig(level=4)
