"""What is made of a dump: the map's cells, the largest sequences, shared prefixes, a tier's health."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from pagemgr.dump import take
from pagemgr.manager import BlockManager
from pagemgr.pool import BlockState
from pagemgr.service.summary import block_map, health, largest_sequences, shared_prefixes


@pytest.fixture(scope="module")
def manager() -> BlockManager:
    manager = BlockManager(101, 4, max_sequences=16, num_host_blocks=8)
    for prompt, count in ((list(range(18)), 4), (list(range(50, 59)), 2), (list(range(90, 95)), 1)):
        sequences = manager.add_many([prompt])
        manager.commit(manager.reserve(sequences, [prompt]))
        if count > 1:
            sequences += manager.fork(sequences[0], count - 1)
            manager.commit(manager.reserve(sequences, [[i] for i in range(count)]))
    gone = manager.add(range(200, 216))
    manager.commit(manager.reserve([gone], [range(200, 216)]))
    manager.free([gone])
    return manager


@pytest.mark.parametrize("cells", [1, 2, 7, 40, 100, 101, 4096])
def test_the_map_counts_every_block_once(manager: BlockManager, cells: int) -> None:
    tier = take(manager).tiers[0]
    found = block_map(tier, cells)
    counts = np.array(found["counts"])
    assert counts.shape[1] == len(found["references"]) <= cells
    assert found["blocks_per_cell"] == -(-101 // cells)
    for state in BlockState:
        assert counts[state].sum() == (tier.state == state).sum()
    sizes = [found["blocks_per_cell"]] * (counts.shape[1] - 1)
    assert counts.sum(axis=0).tolist() == [*sizes, 101 - sum(sizes)]
    assert max(found["references"]) == tier.refs.max() == 4


def test_a_cell_of_one_block_is_that_block(manager: BlockManager) -> None:
    tier = take(manager).tiers[0]
    found = block_map(tier, 101)
    assert found["references"] == tier.refs.tolist()
    assert np.argmax(np.array(found["counts"]), axis=0).tolist() == tier.state.tolist()


def test_a_million_blocks_take_little_time() -> None:
    manager = BlockManager(1_000_000, 16, max_seq_len=1024)
    started = time.perf_counter()
    found = block_map(take(manager).tiers[0], 4096)
    assert time.perf_counter() - started < 1
    assert sum(found["counts"][BlockState.free]) == 999_999


def test_the_largest_come_first(manager: BlockManager) -> None:
    dump = take(manager, block_bytes=10)
    found = largest_sequences(dump, 100)
    assert [one["blocks"] for one in found] == [5, 5, 5, 5, 3, 3, 2]
    assert [one["tokens"] for one in found] == [19, 19, 19, 19, 10, 10, 5]
    assert [one["shared_blocks"] for one in found] == [4, 4, 4, 4, 2, 2, 0]
    assert [one["bytes"] for one in found] == [50, 50, 50, 50, 30, 30, 20]
    assert largest_sequences(dump, 2) == found[:2]
    assert {one["doing"] for one in found} == {"idle"}


def test_prefixes_say_who_shares_how_much(manager: BlockManager) -> None:
    dump = take(manager, block_bytes=10)
    first, second = shared_prefixes(dump, 10)
    assert (first["sequences"], first["common_tokens"], first["saved_blocks"], first["saved_bytes"]) == (4, 16, 12, 120)
    assert (second["sequences"], second["common_tokens"], second["saved_blocks"]) == (2, 8, 2)
    assert first["saved_blocks"] + second["saved_blocks"] == dump.stats.device.saved
    assert shared_prefixes(dump, 1) == [first]


def test_forks_that_have_not_written_agree_on_all_they_hold() -> None:
    manager = BlockManager(20, 4)
    first = manager.add(range(6))
    manager.commit(manager.reserve([first], [range(6)]))
    manager.fork(first)
    (family,) = shared_prefixes(take(manager), 10)
    assert (family["common_tokens"], family["saved_blocks"]) == (6, 2)


@pytest.mark.parametrize(
    ("free", "cached", "full", "word"),
    [(100, 0, 0, "idle"), (90, 10, 0, "ok"), (0, 5, 95, "ok"), (2, 2, 96, "tight"), (0, 0, 100, "full")],
)
def test_health_is_one_word(manager: BlockManager, free: int, cached: int, full: int, word: str) -> None:
    tier = dataclasses.replace(manager.stats().device, free=free, cached=cached, full=full, open=0)
    assert health(tier) == word
