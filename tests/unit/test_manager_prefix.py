"""What ``add`` finds in the prefix cache, for whom, and what eviction takes away in which order."""

from __future__ import annotations

import numpy as np
import pytest
from managers import KINDS, Gate, Make, blocks, cached_tokens, filled, run, states

from pagemgr.errors import ConfigError, InvalidInput, OutOfBlocks, OutOfSequences, SequenceTooLong
from pagemgr.prefix import Namespace

pytestmark = KINDS


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        ([], 0),
        ([1], 0),
        ([1, 2], 1),  # exactly one block: a token is left to run
        ([1, 2, 3], 2),
        ([1, 2, 3, 4], 3),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5, 6, 7], 4),  # block 3 was not full
        ([1, 2, 9, 4, 5], 2),
        ([1, 2, 3, 9, 5], 3),  # block 2 begins alike
        ([9, 2, 3, 4, 5], 0),
        ([3, 4, 5], 0),  # a block is named by all that stands before it
    ],
    ids=str,
)
def test_all_that_is_there_is_matched_and_a_token_is_left(make: Make, prompt: list[int], cached: int) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3, 4, 5])
    a = manager.add(prompt)
    assert a.num_cached_tokens == cached
    assert manager.lengths([a]).tolist() == [cached]
    assert blocks(manager, a) == [1, 2][: -(-cached // 2)]


def test_generated_tokens_are_matched_as_well(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3])
    for token in (4, 5, 6):
        run(manager, [a], [[token]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5, 6, 7]) == 6


def test_a_hit_shares_blocks(make: Make) -> None:
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3])
    b = filled(manager, [1, 2, 4])
    assert (blocks(manager, a), blocks(manager, b)) == ([1, 2], [1, 3])
    stats = manager.stats()
    assert (stats.device.used, stats.device.references, stats.device.saved) == (3, 4, 1)
    assert (stats.counters.prefix_query_tokens, stats.counters.prefix_hit_tokens) == (6, 2)
    assert stats.hit_ratio == 2 / 6


def test_a_prompt_that_is_not_looked_up_is_shared_afterwards(make: Make) -> None:
    """Who needs every position computed, as for the log-probabilities of a prompt, adds without it."""
    manager = make(9, 2)
    a = filled(manager, [1, 2, 3])
    b = manager.add()
    plan = run(manager, [b], [[1, 2, 3]])
    assert plan.num_tokens == 3
    assert (blocks(manager, a), blocks(manager, b)) == ([1, 2], [1, 4])
    assert manager.stats().counters.duplicate_blocks == 1
    assert manager.stats().counters.prefix_query_tokens == 3


def test_prompts_may_be_any_row_of_integers(make: Make) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3])
    for prompt in ((1, 2, 3), np.array([1, 2, 3], dtype=np.uint16), np.arange(1, 7)[:3], iter([1, 2, 3]), range(1, 4)):
        assert cached_tokens(manager, prompt) == 2


def test_without_caching_nothing_is_matched(make: Make) -> None:
    manager = make(9, 2, prefix_caching=False)
    a = filled(manager, [1, 2, 3])
    assert manager.add([1, 2, 3]).num_cached_tokens == 0
    assert states(manager) == {"free": 6, "open": 2}
    manager.free([a])
    assert states(manager) == {"free": 8}


# Namespaces ---------------------------------------------------------------------------------------------------------

X = Namespace(tenant="x")


@pytest.mark.parametrize(
    ("other", "hit"),
    [
        (Namespace(tenant="x"), True),
        (None, False),
        (Namespace(), False),
        (Namespace(tenant="y"), False),
        (Namespace(tenant=""), False),
        (Namespace(adapter="x"), False),
        (Namespace(tenant="x", adapter="x"), False),
        (Namespace(media=(b"x",)), False),
        (Namespace(tenant="x", media=(b"",)), False),
    ],
    ids=str,
)
def test_only_equal_namespaces_share(make: Make, other: Namespace | None, hit: bool) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3], X)
    assert cached_tokens(manager, [1, 2, 3], other) == (2 if hit else 0)


def test_no_namespace_is_one_of_its_own(make: Make) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3])
    assert cached_tokens(manager, [1, 2, 3], Namespace()) == 2
    assert cached_tokens(manager, [1, 2, 3], Namespace(tenant="")) == 0


def test_forks_stay_in_their_namespace(make: Make) -> None:
    manager = make(9, 2)
    (child,) = manager.fork(filled(manager, [1], X))
    run(manager, [child], [[2, 3]])
    assert cached_tokens(manager, [1, 2, 3], X) == 2
    assert cached_tokens(manager, [1, 2, 3]) == 0


def test_namespaces_belong_to_prompts_one_to_one(make: Make) -> None:
    manager = make(9, 2)
    filled(manager, [1, 2, 3], X)
    found = manager.add_many([[1, 2, 3], [1, 2, 3]], [None, X])
    assert [sequence.num_cached_tokens for sequence in found] == [0, 2]
    for wrong in ([], [X], [X, X, X]):
        with pytest.raises(InvalidInput, match="2 prompts but"):
            manager.add_many([[1, 2, 3], [1, 2, 3]], wrong)


# Eviction -----------------------------------------------------------------------------------------------------------


def test_a_freed_sequence_leaves_its_full_blocks_cached(make: Make) -> None:
    manager = make(9, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    assert states(manager) == {"free": 6, "cached": 2}
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 4


def test_blanks_go_before_cached_blocks(make: Make) -> None:
    manager = make(6, 2)
    manager.free([filled(manager, [1, 2, 3, 4])])
    a = manager.add()
    assert manager.reserve([a], [6]).block_table.tolist() == [[3, 4, 5]]
    assert manager.stats().device.evicted_total == 0
    assert manager.reserve([a], [2]).block_table.tolist() == [[3, 4, 5, 2]]
    assert manager.stats().device.evicted_total == 1


def test_children_go_before_their_parents(make: Make) -> None:
    manager = make(7, 2)
    a = filled(manager, [1, 2, 3, 4, 5, 6])  # blocks 1 2 3
    b = filled(manager, [1, 2, 7, 8, 9, 9])  # blocks 1 4 5
    manager.free([a, b])
    c = manager.add()
    assert manager.reserve([c], [12]).block_table.tolist() == [[6, 3, 2, 5, 4, 1]]


def test_the_least_recently_released_goes_first(make: Make) -> None:
    manager = make(6, 2)
    a, b, c = (filled(manager, [token] * 2) for token in (1, 2, 3))
    manager.free([b])
    manager.free([c])
    manager.free([a])
    assert cached_tokens(manager, [2, 2, 0]) == 2  # releases block 2 anew
    d = manager.add()
    assert manager.reserve([d], [10]).block_table.tolist() == [[4, 5, 3, 1, 2]]


def test_what_a_hit_holds_is_not_evicted(make: Make) -> None:
    manager = make(4, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    a, b = manager.add_many([[1, 2, 9], []])
    with pytest.raises(OutOfBlocks) as raised:
        manager.reserve([b], [6])
    error = raised.value
    assert (error.requested, error.available, error.fenced, error.tier) == (3, 2, 0, "device")
    assert manager.reserve([a], [4]).block_table.tolist() == [[1, 3, 2]]
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 2


def test_evicted_prefixes_are_found_no_more(make: Make) -> None:
    manager = make(4, 2)
    manager.free([filled(manager, [1, 2, 3, 4, 5])])
    a = filled(manager, [7, 7, 7])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 2
    run(manager, [a], [[7, 7]])
    assert cached_tokens(manager, [1, 2, 3, 4, 5]) == 0
    assert manager.stats().device.evicted_total == 2


def test_a_fenced_block_can_be_hit(make: Make) -> None:
    manager = make(9, 2)
    gate = Gate()
    manager.free([filled(manager, [1, 2, 3])], after=gate)
    a = manager.add([1, 2, 3])
    assert blocks(manager, a) == [1]
    assert states(manager) == {"free": 6, "full": 1, "fenced": 1}
    manager.free([a])
    assert states(manager) == {"free": 6, "fenced": 2}
    gate.passed = True
    assert states(manager) == {"free": 7, "cached": 1}


# Limits -------------------------------------------------------------------------------------------------------------


def test_no_row_is_left(make: Make) -> None:
    manager = make(9, 2, max_sequences=2)
    a = manager.add()
    with pytest.raises(OutOfSequences) as raised:
        manager.add_many([[1], [2]])
    assert (raised.value.requested, raised.value.available, raised.value.limit) == (2, 1, 2)
    with pytest.raises(OutOfSequences):
        manager.fork(a, 2)
    assert manager.stats().sequences == 1
    assert manager.stats().counters.failures["out_of_sequences"] == 2


def test_a_sequence_outgrows_its_row(make: Make) -> None:
    manager = make(9, 4, max_seq_len=6)
    with pytest.raises(SequenceTooLong) as raised:
        manager.add([0] * 7)
    assert (raised.value.length, raised.value.limit) == (7, 6)
    a = filled(manager, [0] * 5)
    with pytest.raises(SequenceTooLong) as raised:
        manager.reserve([a], [2])
    assert (raised.value.length, raised.value.limit) == (7, 6)
    run(manager, [a], [[1]])
    assert manager.stats().counters.failures["sequence_too_long"] == 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_blocks": 1},
        {"num_blocks": 0},
        {"num_blocks": -4},
        {"block_size": 0},
        {"max_sequences": 0},
        {"max_seq_len": 0},
        {"max_seq_len": 17},
        {"num_host_blocks": 1},
        {"num_host_blocks": -2},
    ],
    ids=str,
)
def test_sizes_that_cannot_work(make: Make, sizes: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        make(**{"num_blocks": 9, "block_size": 2, **sizes})


def test_an_unknown_policy_is_named_with_those_there_are(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"'mru' is unknown; there are: .*lru"):
        make(9, 2, eviction="mru")
