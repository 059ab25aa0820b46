"""LRU against an ordered dict, its log compacted again and again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemgr.errors import ConfigError
from pagemgr.eviction import LRU, make_policy, names
from pagemgr.prefix import PrefixIndex

BLOCKS = 12
SOME = st.lists(st.integers(1, BLOCKS - 1), max_size=BLOCKS, unique=True)


def ids(blocks: list[int]) -> np.ndarray:
    return np.array(blocks, dtype=np.int32)


def agree(policy: LRU, order: OrderedDict[int, None]) -> None:
    expected = list(order)
    for count in (len(order), 1, 0, len(order) // 2):
        assert policy.victims(count).tolist() == expected[:count]


@given(st.lists(st.tuples(st.sampled_from(["insert", "hit", "evict"]), SOME), max_size=80))
def test_lru_is_an_ordered_dict(calls: list[tuple[str, list[int]]]) -> None:
    policy, order = LRU(BLOCKS), OrderedDict[int, None]()
    for verb, blocks in calls:
        if verb == "insert":
            new = [block for block in blocks if block not in order]
            policy.insert(ids(new))
            order.update(dict.fromkeys(new))
        else:
            old = [block for block in blocks if block in order]
            gone = ids(old) if verb == "hit" else policy.victims(len(old))
            policy.hit(gone)
            for block in gone.tolist():
                del order[block]
        agree(policy, order)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [2, 3, 64, 500])
def test_the_order_survives_compaction(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    policy, order = LRU(size), OrderedDict[int, None]()
    released = 0
    while released < 12 * size + 1000:
        idle = [block for block in range(1, size) if block not in order]
        new = rng.permutation(idle)[: rng.integers(0, len(idle) + 1)].astype(np.int32)
        policy.insert(new)
        order.update(dict.fromkeys(new.tolist()))
        released += max(len(new), 1)
        hit = [block for block in order if rng.random() < 0.6]
        policy.hit(ids(hit))
        for block in hit:
            del order[block]
        agree(policy, order)


def test_victims_far_behind_dead_entries() -> None:
    policy = LRU(1000)
    policy.insert(np.arange(1, 1000, dtype=np.int32))
    policy.hit(np.arange(1, 998, dtype=np.int32))
    assert policy.victims(1).tolist() == [998]
    assert policy.victims(2).tolist() == [998, 999]
    policy.insert(ids([5]))
    assert policy.victims(3).tolist() == [998, 999, 5]


def test_a_policy_is_made_by_name() -> None:
    assert isinstance(make_policy("lru", 4, PrefixIndex(4, 4)), LRU)
    with pytest.raises(ConfigError) as raised:
        make_policy("fifo", 4, PrefixIndex(4, 4))
    assert all(name in str(raised.value) for name in ("fifo", *names()))
