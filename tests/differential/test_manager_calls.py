"""The same calls give the same decisions, whoever makes them and however they are batched."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from caller import Caller
from managers import KINDS, Make, blocks, cached_tokens, filled, run
from snapshot import differences, snapshot

from pagemgr.manager import BlockManager

SIZES = {"num_blocks": 60, "block_size": 3, "max_sequences": 12, "num_host_blocks": 30}
TOTALS = ("_next_step", "counters", "_counters", "digest")


def decisions(manager: BlockManager, seed: int, calls: int) -> tuple[list[list[int]], str]:
    """Every table and slot of every plan and transfer, and the digest in the end."""
    caller = Caller(manager, seed)
    for _ in range(calls):
        caller.act()
    manager.check()
    assert min(caller.done[verb] for verb in ("add", "reserve", "commit", "fork", "free", "swap_out", "swap_in")) > 0
    return caller.plans, manager.stats().digest


# Determinism --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_decide_alike(make: Make, seed: int) -> None:
    one, other = make(**SIZES), make(**SIZES)
    assert decisions(one, seed, 400) == decisions(other, seed, 400)
    assert one.stats() == other.stats()


@KINDS
def test_the_digest_tells_decisions_apart(make: Make) -> None:
    digests = {decisions(make(**SIZES), seed, 200)[1] for seed in range(6)}
    assert len(digests) == 6


@KINDS
def test_one_call_that_differs_shows_in_the_digest(make: Make) -> None:
    one, other = make(9, 2), make(9, 2)
    for manager in (one, other):
        filled(manager, [1, 2, 3])
    assert one.stats().digest == other.stats().digest
    one.add([1, 2, 3])  # a hit
    other.add([8, 9, 3])  # a miss
    assert one.stats().digest != other.stats().digest


def test_nothing_depends_on_hash_seeds() -> None:
    """Another process, with other hashes of bytes and strings and other addresses, decides alike."""
    tests = Path(__file__).resolve().parents[1]
    code = (
        "import sys; sys.path[:0] = sys.argv[1:];"
        "from test_manager_calls import SIZES, decisions; from pagemgr.manager import BlockManager;"
        "print(decisions(BlockManager(**SIZES), 7, 400))"
    )
    paths = [str(tests.parent), str(tests), str(tests / "differential")]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, *paths],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].strip() == str(decisions(BlockManager(**SIZES), 7, 400))


# Batches ------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_its_calls_one_by_one(make: Make, seed: int) -> None:
    """Where sequences share nothing, it does not matter whether they are named in one call or in several."""
    rng = np.random.default_rng(seed)
    batched, single = make(60, 3, max_sequences=8), make(60, 3, max_sequences=8)
    prompts = [rng.integers(0, 50, rng.integers(0, 12)) for _ in range(6)]
    ours, theirs = batched.add_many(prompts), [single.add(prompt) for prompt in prompts]
    assert not differences(snapshot(batched), snapshot(single))
    for _ in range(4):
        tokens = [rng.integers(0, 50, rng.integers(1, 8)) for _ in prompts]
        run(batched, ours, tokens)
        for sequence, new in zip(theirs, tokens, strict=True):
            run(single, [sequence], [new])
        assert [blocks(batched, a) for a in ours] == [blocks(single, b) for b in theirs]
    lengths = [int(rng.integers(0, length + 1)) for length in batched.lengths(ours)]
    batched.truncate(ours, lengths)
    for sequence, length in zip(theirs, lengths, strict=True):
        single.truncate([sequence], [length])
    assert not differences(snapshot(batched, TOTALS), snapshot(single, TOTALS))
    batched.free(ours)
    for sequence in theirs:
        single.free([sequence])
    assert not differences(snapshot(batched, TOTALS), snapshot(single, TOTALS))


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_a_prompt_are_the_prompt(make: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 9, 40).tolist()
    whole, parts = make(40, 3), make(40, 3)
    one, other = filled(whole, prompt), parts.add(prompt)
    start = 0
    while start < len(prompt):
        end = start + int(rng.integers(1, 8))
        run(parts, [other], [prompt[start:end]])
        start = end
    assert blocks(whole, one) == blocks(parts, other)
    for manager in (whole, parts):
        assert cached_tokens(manager, [*prompt, 0, 0, 0]) == 39


# Eviction -----------------------------------------------------------------------------------------------------------


def lru_hits(prompts: list[list[int]], capacity: int, size: int) -> list[int]:
    """Cached tokens of each prompt, served one after another by a cache of ``capacity`` blocks: LRU, leaves first."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    hits = []
    for prompt in prompts:
        usable = [tuple(prompt[:end]) for end in range(size, len(prompt), size)]
        names = [tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size)]
        hit = next((i for i, name in enumerate(usable) if name not in cache), len(usable))
        hits.append(hit * size)
        held = {name: cache.pop(name) for name in names[:hit]}
        needed = -(-len(prompt) // size) - hit
        while len(cache) + len(held) + needed > capacity:
            cache.popitem(last=False)
        for name in names[hit:]:
            if name in cache:  # computed again though it is there, because a token had to be left to run
                del cache[name]
        cache.update(dict.fromkeys(reversed(names)))
    return hits


@KINDS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [12, 20, 50])
def test_hits_are_those_of_an_ordered_dict(make: Make, capacity: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 99, rng.integers(0, 20)).tolist() for _ in range(6)]
    prompts = []
    for _ in range(300):
        stem = stems[rng.integers(len(stems))]
        prompts.append(stem[: rng.integers(0, len(stem) + 1)] + rng.integers(0, 2, rng.integers(1, 6)).tolist())
    manager = make(capacity + 1, 2, partial_hits=False)
    found = []
    for prompt in prompts:
        sequence = filled(manager, prompt)
        found.append(sequence.num_cached_tokens)
        manager.free([sequence])
    assert found == lru_hits(prompts, capacity, 2)
    assert sum(found) > 0
    assert manager.stats().device.evicted_total > 0
