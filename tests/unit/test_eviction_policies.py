"""The policies that judge branches: against naive models on random calls, and inside the manager under fire."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemgr.errors import ConfigError, InternalError, OutOfBlocks
from pagemgr.eviction import LRU, EvictionPolicy, make_policy, names, registry
from pagemgr.eviction.branches import Branches
from pagemgr.eviction.frequency import LFU, S3FIFO
from pagemgr.eviction.hit_density import HitDensity
from pagemgr.manager import BlockManager
from pagemgr.prefix import PrefixIndex

POLICIES = pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "hit_density"])


class Tree:
    """A prefix tree in a small pool, driven at random through a policy, as a pool would drive it."""

    def __init__(self, make: type[Branches], blocks: int, rng: np.random.Generator) -> None:
        self.index = PrefixIndex(blocks, 1)
        self.policy = make(blocks, self.index)
        self.rng = rng
        self.free = list(range(1, blocks))
        self.held: dict[tuple[int, ...], int] = {}  # path → block
        self.calls: list[tuple[str, list[int]]] = []
        self.models: list[Naive] = []
        """Told what the policy is told."""

    def tell(self, verb: str, blocks: list[int]) -> None:
        getattr(self.policy, verb)(np.array(blocks, dtype=np.int32))
        self.calls.append((verb, blocks))
        for model in self.models:
            getattr(model, verb)(blocks)

    def request(self) -> None:
        """One path: hit what is there, evict for the rest, release all of it leaf first."""
        path = tuple(self.rng.integers(0, 2, self.rng.integers(1, 8)).tolist())
        prefixes = [path[: depth + 1] for depth in range(len(path))]
        hits = [self.held[prefix] for prefix in prefixes if prefix in self.held]
        if hits:
            self.tell("hit", hits)
        new = prefixes[len(hits) :]
        short = len(new) - len(self.free)
        if short > 0:
            victims = self.policy.victims(short).tolist()
            if len(victims) < short:
                self.tell("insert", hits[::-1])
                return
            gone = {block: prefix for prefix, block in self.held.items()}
            for block in victims:
                del self.held[gone[block]]
            self.tell("evict", victims)
            self.free += victims
        for prefix in new:
            block = self.held[prefix] = self.free.pop()
            self.index.parents[block] = self.held.get(prefix[:-1], 0)
            self.index.names[block] = np.frombuffer(repr(prefix).encode().ljust(32)[-32:], np.uint8)
            self.index.names[block, :4] = np.frombuffer(np.uint32(hash(prefix) & 0xFFFFFFFF).tobytes(), np.uint8)
        self.tell("insert", [self.held[prefix] for prefix in prefixes[::-1]])


class Naive:
    """Branches as lists of lists; a subclass labels blocks and says what a label is worth."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.branches: list[tuple[int, list[int]]] = []

    def insert(self, blocks: list[int]) -> None:
        previous = None
        for block in blocks:
            label = self.label(block)
            if previous is None or self.index.parents[previous] != block or self.branches[-1][0] != label:
                self.branches.append((label, []))
            self.branches[-1][1].append(block)
            previous = block

    def leave(self, blocks: list[int]) -> None:
        for _, members in self.branches:
            members[:] = [block for block in members if block not in blocks]

    def order(self) -> list[int]:
        branches = [(label, members) for label, members in self.branches if members]
        worth = [self.worth(label, branches) for label, _ in branches]
        for _ in branches:
            for i, (_, members) in enumerate(branches):
                above = self.index.parents[members[-1]]
                for j, (_, others) in enumerate(branches):
                    if above in others:
                        worth[j] = max(worth[j], worth[i])
        ranked = sorted(range(len(branches)), key=lambda i: (worth[i], i))
        return [block for i in ranked for block in branches[i][1]]

    def label(self, block: int) -> int:
        raise NotImplementedError

    def worth(self, label: int, branches: list[tuple[int, list[int]]]) -> float:
        raise NotImplementedError


class NaiveLFU(Naive):
    def __init__(self, index: PrefixIndex) -> None:
        super().__init__(index)
        self.uses: dict[int, int] = {}

    def hit(self, blocks: list[int]) -> None:
        self.leave(blocks)
        for block in blocks:
            self.uses[block] = self.label(block) + 1

    def evict(self, blocks: list[int]) -> None:
        self.leave(blocks)
        for block in blocks:
            self.uses.pop(block, None)

    def label(self, block: int) -> int:
        return self.uses.get(block, 1)

    def worth(self, label: int, branches: list[tuple[int, list[int]]]) -> float:
        return label


class NaiveS3FIFO(Naive):
    def __init__(self, index: PrefixIndex) -> None:
        super().__init__(index)
        self.main: set[int] = set()
        self.known: set[int] = set()
        self.ghosts: dict[int, bytes] = {}
        self.size = 1 << (len(index.parents) - 1).bit_length()

    def slot(self, block: int) -> tuple[int, bytes]:
        key = self.index.names[block, :4].tobytes()
        return int.from_bytes(key, "little") % self.size, key

    def insert(self, blocks: list[int]) -> None:
        for block in blocks:
            slot, key = self.slot(block)
            if block not in self.known and self.ghosts.get(slot) == key:
                self.main.add(block)
            self.known.add(block)
        super().insert(blocks)

    def hit(self, blocks: list[int]) -> None:
        self.leave(blocks)
        self.main |= set(blocks)

    def evict(self, blocks: list[int]) -> None:
        self.leave(blocks)
        self.ghosts.update(self.slot(block) for block in blocks if block not in self.main)
        self.main -= set(blocks)
        self.known -= set(blocks)

    def label(self, block: int) -> int:
        return block in self.main

    def worth(self, label: int, branches: list[tuple[int, list[int]]]) -> float:
        sizes = [len(members) for main, members in branches if not main]
        cached = sum(len(members) for _, members in branches)
        return float(bool(label) == (10 * sum(sizes) > cached))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("make", "naive"), [(LFU, NaiveLFU), (S3FIFO, NaiveS3FIFO)])
def test_against_a_naive_model(
    make: type[Branches], naive: type[Naive], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a new ranking for every eviction, so that the order is exact."""
    monkeypatch.setattr(Branches, "_share", lambda self: 0)
    tree = Tree(make, 24, np.random.default_rng(seed))
    model = naive(tree.index)
    tree.models.append(model)
    for _ in range(400):
        tree.request()
        expected = model.order()
        for count in (len(expected), 1, len(expected) // 2):
            assert tree.policy.victims(count).tolist() == expected[:count]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", [LFU, S3FIFO, HitDensity])
def test_order_children_first_and_all_of_it(make: type[Branches], seed: int) -> None:
    """However much is evicted at once and however stale the ranking: every cached block once, children first."""
    tree = Tree(make, 60, np.random.default_rng(seed))
    for _ in range(600):
        tree.request()
        order = tree.policy.victims(len(tree.held)).tolist()
        assert sorted(order) == sorted(tree.held.values())
        leaf_first(order, tree.index)
        some = tree.policy.victims(7).tolist()
        leaf_first(some, tree.index, tree.held.values())


def leaf_first(order: list[int], index: PrefixIndex, cached: object = ()) -> None:
    """No block stands before one that hangs on it, and none is offered while such a one is not."""
    place = {block: i for i, block in enumerate(order)}
    for child in set(order) | set(cached):  # type: ignore[call-overload]
        parent = int(index.parents[child])
        if parent in place:
            assert place.get(child, len(order)) < place[parent], (child, parent, order)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [LFU, S3FIFO, HitDensity])
def test_victims_is_pure(make: type[Branches], seed: int) -> None:
    """Asking never changes what is answered later."""
    asked, quiet = (Tree(make, 40, np.random.default_rng(seed)) for _ in range(2))
    for step in range(500):
        asked.request()
        quiet.request()
        for count in (step % 40, 1, 39):
            asked.policy.victims(min(count, len(asked.held)))
        assert asked.calls == quiet.calls


def drive(manager: BlockManager, rng: np.random.Generator, steps: int) -> Iterator[None]:
    """Random sequences over a small tree of tokens: added, extended, forked, truncated, swapped, freed."""
    live: list = []
    for _ in range(steps):
        verb = rng.integers(6) if live else 0
        try:
            if verb <= 1 and len(live) < 8:
                prompt = np.concatenate([np.zeros(int(rng.integers(9)), int), rng.integers(0, 2, rng.integers(1, 12))])
                sequence = manager.add(prompt)
                live.append(sequence)
                manager.commit(manager.reserve([sequence], [prompt[sequence.num_cached_tokens :]]))
            elif verb == 2:
                manager.commit(manager.reserve(live[:1], [rng.integers(0, 2, 3)]))
            elif verb == 3:
                live += manager.fork(live[0]) if len(live) < 8 else []
            elif verb == 4:
                manager.truncate(live[:1], [int(rng.integers(1 + manager.lengths(live[:1])[0]))])
            else:
                moved = live[: int(rng.integers(1, 3))]
                manager.finish(manager.swap_out(moved))
                manager.finish(manager.swap_in(moved))
        except OutOfBlocks:
            pass
        if len(live) > 5 or verb == 5:
            resident = [one for one in live if manager.table.tier[one.row] == 0 or rng.integers(2)]
            gone = [resident[i] for i in rng.permutation(len(resident))[:3]]
            manager.free(gone)
            live = [one for one in live if one not in gone]
        yield


@POLICIES
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_in_the_manager(policy: str, compiled: bool, seed: int) -> None:
    manager = BlockManager(
        40, 2, max_sequences=12, num_host_blocks=30, eviction=policy, compiled=compiled, max_seq_len=60
    )
    for _ in drive(manager, np.random.default_rng(seed), 400):
        manager.check()
        for tier in manager.tiers:
            leaf_first(tier.pool.policy.victims(tier.pool.counts[4]).tolist(), tier.index)
    assert manager.stats().device.evicted_total > 100


@POLICIES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), often=st.integers(1, 9))
def test_same_calls_same_victims(policy: str, seed: int, often: int) -> None:
    """Two ranks, one of which is checked now and then."""
    ranks = [BlockManager(30, 2, max_sequences=12, num_host_blocks=30, eviction=policy, max_seq_len=50) for _ in "ab"]
    rngs = [np.random.default_rng(seed) for _ in ranks]
    for step, _ in enumerate(zip(*(drive(rank, rng, 60) for rank, rng in zip(ranks, rngs, strict=True)), strict=True)):
        if step % often == 0:
            ranks[0].check()
        assert ranks[0].stats() == ranks[1].stats()


class Offers(LRU):
    """Offers the null block."""

    def __init__(self, num_blocks: int, prefixes: object) -> None:
        super().__init__(num_blocks)

    def victims(self, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int32)


def breaks(num_blocks: int, prefixes: object) -> EvictionPolicy:
    raise RuntimeError("no licence")


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        EntryPoint(name, f"{__name__}:{value}", registry.GROUP)
        for name, value in (("offers", "Offers"), ("breaks", "breaks"), ("lru", "breaks"), ("gone", "Missing"))
    ]
    found.append(EntryPoint("thing", "builtins:pow", registry.GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


@pytest.mark.usefixtures("plugins")
def test_plugins_are_found_by_name_and_cannot_take_ours() -> None:
    assert names() == ["lru", "lfu", "s3fifo", "hit_density", "breaks", "gone", "offers", "thing"]
    assert isinstance(make_policy("lru", 4, PrefixIndex(4, 4)), LRU)
    manager = BlockManager(4, 2, eviction="offers")
    sequence = manager.add([1] * 6)
    manager.commit(manager.reserve([sequence], [[1] * 6]))
    manager.free([sequence])
    second = manager.add([2])
    with pytest.raises(InternalError, match="Offers offered blocks that cannot be evicted"):
        manager.reserve([second], [[2] * 6])


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("breaks", "RuntimeError: no licence"), ("gone", "AttributeError"), ("thing", "TypeError|lacks")],
)
def test_a_broken_plugin_is_a_config_error(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"eviction.policy = '{name}': .*({reason})"):
        BlockManager(4, 2, eviction=name)
