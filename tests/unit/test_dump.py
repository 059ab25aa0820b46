"""A dump: true to the manager, readable again, silent about content, and quick to find what is broken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagemgr.dump import Dump, from_document, problems, take, to_document
from pagemgr.errors import InvalidInput
from pagemgr.manager import BlockManager
from pagemgr.pool import FREE, BlockState
from pagemgr.prefix import Namespace
from pagemgr.sequences import MOVING

SECRET_TOKEN = 1_234_567_891
TENANT = "a tenant's name"


@pytest.fixture(
    params=[
        {"compiled": True},
        {"compiled": False},
        {"windows": (None, 8), "rollback": 0},
        {"host_cache": "inclusive"},
        {"debug": 3},
    ],
    ids=["compiled", "python", "groups", "host cache", "debug"],
)
def manager(request: pytest.FixtureRequest) -> BlockManager:
    """Shared and private blocks, a pin, a step in flight, a fence, a transfer under way, cached blocks."""
    manager = BlockManager(64, 4, max_sequences=12, num_host_blocks=16, pin_quota=10, **request.param)
    namespace = Namespace(tenant=TENANT)
    first = manager.add([SECRET_TOKEN] * 10, namespace)
    manager.commit(manager.reserve([first], [[SECRET_TOKEN] * 10]))
    manager.pin(first, TENANT)
    children = manager.fork(first, 2)
    manager.commit(manager.reserve(children, [[1, 2], [3]]))
    other, leaving, gone = manager.add_many([range(20), range(100, 107), range(200, 208)])
    manager.commit(manager.reserve([other, leaving, gone], [range(20), range(100, 107), range(200, 208)]))
    manager.free([gone])
    manager.swap_out([leaving])
    manager.reserve([other], [[5]])
    manager.free([children[1]])
    return manager


def test_it_says_what_the_manager_holds(manager: BlockManager) -> None:
    dump = take(manager, block_bytes=100)
    manager.check()
    assert dump.stats == manager.stats()
    for tier, live in zip(dump.tiers, manager.tiers, strict=True):
        assert np.array_equal(tier.state, live.pool.state)
        assert np.array_equal(tier.refs, live.pool.refs)
    rows = sorted(one.row + one.group * manager.table.max_sequences for one in dump.sequences)
    assert rows == np.flatnonzero(manager.table.live).tolist()
    assert {one.last_step for one in dump.sequences} >= {MOVING, 0}
    assert len(dump.tiers[1].held) == 2 * len(dump.windows)
    assert dump.stats.device.pinned + len(dump.tiers[0].held) > 0
    assert problems(dump) == []


def test_it_is_a_copy(manager: BlockManager) -> None:
    dump = take(manager)
    before = dump.tiers[0].state.copy()
    manager.add(range(4))
    manager.tiers[0].pool.state[:] = FREE
    assert np.array_equal(dump.tiers[0].state, before)


def test_it_is_read_back_as_it_was_written(manager: BlockManager) -> None:
    dump = take(manager, 100)
    text = json.dumps(to_document(dump))
    again = from_document(json.loads(text))
    assert json.dumps(to_document(again)) == text
    assert again.stats == dump.stats
    assert problems(again) == []


def test_neither_tokens_nor_names_nor_tenants_are_in_it(manager: BlockManager) -> None:
    text = json.dumps(to_document(take(manager)))
    assert str(SECRET_TOKEN) not in text
    assert TENANT not in text
    root = Namespace(tenant=TENANT).root(4)
    for secret in (root, *(bytes(name) for name in manager.tiers[0].index.names if name.any())):
        assert secret.hex() not in text
        assert str(list(secret))[1:-1] not in text


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda dump: _tier(dump, "refs", 3, 7), r"device: block 3 counts 7 references, but 3 table entries name it"),
        (lambda dump: _tier(dump, "state", 0, BlockState.free), "block 0 must be the one null block"),
        (lambda dump: _tier(dump, "state", 60, BlockState.open), "open or full without a reference: 60"),
        (lambda dump: _tier(dump, "state", 60, BlockState.cached), "full or cached, but not published: 60"),
        (lambda dump: _tier(dump, "published", 60, True), "free or open, but published: 60"),
        (lambda dump: _tier(dump, "state", 60, BlockState.fenced), "are fenced, but wait for no fence: 60"),
        (lambda dump: _tier(dump, "blanks", 0, 1), r"free, but not on the free stack"),
        (lambda dump: _blocks(dump, 0, 0), "names the null block"),
        (lambda dump: _blocks(dump, 0, 64), "tables name blocks that do not exist: 64 of 64"),
        (lambda dump: _blocks(dump, 0, -1), "tables name blocks that do not exist: -1 of 64"),
        (lambda dump: _blocks(dump, 0, None), "names a block twice"),
        (lambda dump: _sequence(dump, committed=99), r"committed 99 ≤ computed 10 ≤ reserved 10 does not hold"),
        (lambda dump: _sequence(dump, reserved=30, computed=30), "has 3 blocks, 30 tokens need 8"),
        (lambda dump: _sequence(dump, reserved=12), "2 tokens are reserved, but no step is in flight"),
        (lambda dump: _sequence(dump, dropped=1), "gave back 1 blocks, more than left a window of 0 tokens"),
        (lambda dump: _sequence(dump, group=1), "is in a layer group that does not exist: 1"),
        (lambda dump: _sequence(dump, tier="moon"), "is in a tier that does not exist: 'moon'"),
        (lambda dump: _stats(dump, free=1), "1 blocks are counted as free, "),
    ],
)
def test_damage_is_named(damage: Callable[[Dump], Dump], sentence: str) -> None:
    manager = BlockManager(64, 4, max_sequences=12, num_host_blocks=16)
    first = manager.add(range(10))
    manager.commit(manager.reserve([first], [range(10)]))
    manager.fork(first, 2)
    sound = take(manager)
    assert problems(sound) == []
    found = problems(damage(sound))
    assert any(sentence in problem for problem in found), found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: [], "not a dump of this version.*got 'list'"),
        (lambda d: {**d, "format": "pagemgr dump 99"}, "'pagemgr dump 1', got 'pagemgr dump 99'"),
        (lambda d: {**d, "block_size": "4"}, "block_size must be a whole number, got '4'"),
        (lambda d: {k: v for k, v in d.items() if k != "tiers"}, "damaged: KeyError: 'tiers'"),
        (lambda d: {**d, "tiers": 3}, "damaged: TypeError"),
        (lambda d: {**d, "stats": {**d["stats"], "tiers": "none"}}, r"damaged: stats\.tiers"),
        (lambda d: _first_tier(d, refs=[1]), "refs must have 64 entries, as state has"),
        (lambda d: _first_tier(d, state=[9] * 64), "a state must be below 6, got 9"),
        (lambda d: _first_tier(d, refs=[10**12] * 64), "damaged: OverflowError"),
        (lambda d: _first_tier(d, refs=[[1]] * 64), "refs must have 64 entries"),
    ],
)
def test_what_is_no_dump_is_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    document = to_document(take(BlockManager(64, 4)))
    with pytest.raises(InvalidInput, match=reason):
        from_document(change(document))


def _tier(dump: Dump, name: str, at: int, value: Any) -> Dump:
    array = getattr(dump.tiers[0], name).copy()
    array[at] = value
    return dataclasses.replace(dump, tiers=(dataclasses.replace(dump.tiers[0], **{name: array}), *dump.tiers[1:]))


def _blocks(dump: Dump, at: int, value: int | None) -> Dump:
    blocks = dump.sequences[0].blocks.copy()
    blocks[at] = blocks[at + 1] if value is None else value
    return _sequence(dump, blocks=blocks)


def _sequence(dump: Dump, **changes: Any) -> Dump:
    return dataclasses.replace(dump, sequences=(dataclasses.replace(dump.sequences[0], **changes), *dump.sequences[1:]))


def _stats(dump: Dump, **changes: Any) -> Dump:
    device = dataclasses.replace(dump.stats.device, **changes)
    return dataclasses.replace(dump, stats=dataclasses.replace(dump.stats, tiers=(device, *dump.stats.tiers[1:])))


def _first_tier(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**document, "tiers": [{**document["tiers"][0], **changes}, *document["tiers"][1:]]}
