"""The compiled loops decide what their Python specification decides: the same calls, the same state, byte for byte."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from pagemgr import accelerator
from pagemgr.errors import BackendUnavailable, PagemgrError
from pagemgr.eviction import names
from pagemgr.manager import BlockManager
from pagemgr.native.build import DEFAULT_CACHE_DIR, recipe
from pagemgr.prefix import Namespace, PrefixIndex, hash_blocks
from pagemgr.sequences import Batch, Sequence


def library() -> tuple[Any, Any]:
    loaded = accelerator.load(DEFAULT_CACHE_DIR)
    if loaded is None:
        try:
            recipe("manager")
        except BackendUnavailable as error:
            pytest.skip(f"nothing to compare: {error}")
    assert loaded is not None, "there is a compiler, but the library does not load"
    return loaded


def state(manager: BlockManager) -> dict[str, bytes | object]:
    """Everything both sides hold, names of unpublished blocks and the form of the index aside."""
    table = {name: value.tobytes() for name, value in vars(manager.table).items() if isinstance(value, np.ndarray)}
    found: dict[str, bytes | object] = dict(table)
    for tier in manager.tiers:
        pool = tier.pool
        arrays = {name: value for name, value in vars(pool).items() if isinstance(value, np.ndarray)}
        arrays["stack"] = pool.stack[: pool.num_free]
        arrays["order of eviction"] = pool.policy.victims(pool.counts[4])
        arrays["tokens"] = tier.index.tokens
        arrays["names"] = tier.index.names[pool.published]
        arrays["parents"] = tier.index.parents[pool.published]
        found |= {f"{tier.name} {name}": array.tobytes() for name, array in arrays.items()}
        found[f"{tier.name} counts"] = list(pool.counts)
    found["stats"] = manager.stats()
    return found


class Pair:
    """Two managers that are called alike."""

    def __init__(self, **sizes: Any) -> None:
        self.both = BlockManager(**sizes), BlockManager(**sizes, compiled=False)

    def call(self, verb: str, *args: Any) -> Any:
        """The answers, which are equal; an error is an answer."""
        answers = []
        for manager, own in zip(self.both, zip(*args, strict=True) if args else ((), ()), strict=True):
            try:
                answers.append(getattr(manager, verb)(*own))
            except PagemgrError as error:
                answers.append((type(error), str(error)))
        return answers


def drive(pair: Pair, rng: np.random.Generator, steps: int) -> None:
    """Random verbs; everything is compared after each."""
    live: list[Sequence] = []
    flying: list[list[Any]] = []
    for _ in range(steps):
        verb = rng.choice(
            ["add", "step", "step", "step", "commit", "commit", "abort", "fork", "truncate", "free", "swap"]
        )
        some = [live[i] for i in rng.permutation(len(live))[: rng.integers(1, 5)]]
        if verb == "add":
            prompt = rng.integers(0, 2, rng.integers(0, 14)).astype(np.int32)
            space = Namespace(tenant=str(rng.integers(2)))
            answers = pair.call("add", (prompt, prompt), (space, space))
            if isinstance(answers[0], Sequence):
                live.append(answers[0])
        elif verb == "step" and some:
            tokens: Any = [
                int(rng.integers(1, 7)) if rng.integers(3) == 0 else rng.integers(0, 2, rng.integers(1, 7))
                for _ in some
            ]
            if rng.integers(2):
                tokens = rng.integers(0, 2, (len(some), rng.integers(1, 4)))
            answers = pair.call("reserve", (Batch(some), some), (tokens, tokens))
            if not isinstance(answers[0], tuple):
                flying.append(answers)
                for name in ("block_table", "slot_mapping", "query_start", "starts", "counts", "previous", "tokens"):
                    assert np.array_equal(*(getattr(plan, name) for plan in answers)), name
        elif verb == "commit" and flying:
            plans = flying.pop(0)
            late = [
                rng.integers(0, 2, count) if plans[0].tokens[start] < 0 and rng.integers(4) else None
                for start, count in zip(plans[0].query_start, plans[0].counts, strict=False)
            ]
            pair.call("commit", plans, (late, late))
        elif verb == "abort" and flying:
            pair.call("abort", flying.pop())
        elif verb == "fork" and some:
            answers = pair.call("fork", (some[0], some[0]), (2, 2))
            live += answers[0] if isinstance(answers[0], list) else []
        elif verb == "truncate" and some:
            length = int(rng.integers(0, 12))
            pair.call("truncate", (some[:1], some[:1]), ([length], [length]))
        elif verb == "free" and some:
            if pair.call("free", (some, some))[0] is None:
                live = [one for one in live if one not in some]
        elif verb == "swap" and some:
            transfers = pair.call(rng.choice(["swap_out", "swap_in"]), (some, some))
            if not isinstance(transfers[0], tuple):
                pair.call(rng.choice(["finish", "cancel"]), transfers)
        one, other = map(state, pair.both)
        assert one == other, [name for name in one if one[name] != other[name]]
    for manager in pair.both:
        manager.check()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_same_calls_same_state(seed: int, block_size: int) -> None:
    library()
    rng = np.random.default_rng([seed, block_size])
    pair = Pair(
        num_blocks=int(rng.integers(8, 40)),
        block_size=block_size,
        max_sequences=10,
        num_host_blocks=24,
        eviction=names()[seed % 4],
    )
    drive(pair, rng, 250)


def test_without_prefix_caching() -> None:
    library()
    drive(Pair(num_blocks=30, block_size=3, max_sequences=8, prefix_caching=False), np.random.default_rng(5), 300)


@pytest.mark.parametrize("block_size", [1, 3, 7, 8, 13, 16, 64, 512])
def test_names_are_sha256(block_size: int) -> None:
    index = accelerator.NativeIndex(4, block_size, library())
    rng = np.random.default_rng(block_size)
    tokens = rng.integers(0, 2**31, 5 * block_size + block_size // 2).astype(np.int32)
    parent = rng.bytes(32)
    assert index.hash(parent, tokens) == hash_blocks(parent, tokens, block_size)
    first = hashlib.sha256(parent + tokens[:block_size].tobytes()).digest()
    assert index.hash(parent, tokens)[:32] == first


def test_index_keeps_every_name_reachable() -> None:
    """Names that start their probe at the same slot, inserted and removed at random, against a dict."""
    library_ = library()
    index, spec = accelerator.NativeIndex(64, 4, library_), PrefixIndex(64, 4)
    rng = np.random.default_rng(1)
    names = [bytes([int(rng.integers(4)), 0, 0, 0, 0, 0, 0, 0]) + rng.bytes(24) for _ in range(200)]
    free, held = list(range(64)), dict[int, bytes]()
    for _ in range(3000):
        if free and rng.integers(2):
            block, name = free.pop(), names[int(rng.integers(len(names)))]
            kept = [one.publish(np.array([block], dtype=np.int32), name) for one in (index, spec)]
            assert kept[0] == kept[1]
            if kept[0][0] == block:
                held[block] = name
            else:
                free.append(block)
        elif held:
            block = int(rng.choice(list(held)))
            for one in (index, spec):
                one.forget(np.array([block], dtype=np.int32))
            del held[block]
            free.append(block)
        assert np.array_equal(index.find(b"".join(names)), spec.find(b"".join(names)))
        assert index.num_published() == spec.num_published() == len(held)


def test_without_a_compiler_the_specification_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        accelerator, "recipe", lambda target: (_ for _ in ()).throw(BackendUnavailable(target, "no g++"))
    )
    accelerator.load.cache_clear()
    try:
        with caplog.at_level("INFO", "pagemgr"):
            manager = BlockManager(8, 4, cache_dir="/nowhere")
    finally:
        accelerator.load.cache_clear()
    assert type(manager.tiers[0].index) is PrefixIndex
    assert "no g++" in caplog.text
