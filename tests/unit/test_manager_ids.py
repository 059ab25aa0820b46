"""Token ids as callers give them: what is taken, what is refused, and that nobody's array is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from managers import KINDS, Make, cached_tokens, run

from pagemgr.errors import InvalidInput, SequenceTooLong
from pagemgr.ids import UNKNOWN, fill_in, pack_batch, pack_tokens

BIG = 2**31 - 1


@pytest.mark.parametrize(
    "given",
    [
        [0, 5, BIG],
        (0, 5, BIG),
        iter([0, 5, BIG]),
        np.array([0, 5, BIG]),
        np.array([0, 5, BIG], dtype=np.uint64),
        np.array([0, 1, 5, 1, BIG, 1], dtype=np.int32)[::2],
        torch.tensor([0, 5, BIG]),
        [np.int64(0), 5, np.uint8(5) + np.int64(BIG - 5)],
    ],
)
def test_rows_of_integers_are_packed(given: object) -> None:
    packed = pack_tokens(given)
    assert packed.tolist() == [0, 5, BIG]
    assert packed.dtype == np.int32
    assert packed.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("given", [[], (), np.zeros(0), np.zeros(0, dtype=np.int8), range(0)], ids=repr)
def test_nothing_is_packed(given: object) -> None:
    packed = pack_tokens(given)
    assert packed.shape == (0,)
    assert packed.dtype == np.int32


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        1.5,
        "12",
        [1.0],
        [True, False],
        ["1"],
        [None],
        [[1, 2]],
        [[1], [1, 2]],
        [-1],
        [2**31],
        [2**63],
        [2**70],
        np.array(3),
        np.ones((2, 2), dtype=np.int32),
        np.array([1, -1], dtype=np.int32),
    ],
    ids=repr,
)
def test_what_is_not_a_row_of_ids_is_refused(given: object) -> None:
    with pytest.raises(InvalidInput, match="token ids must be"):
        pack_tokens(given)


def test_a_batch_is_packed_in_one_row() -> None:
    counts, ids = pack_batch([[1, 2], 3, np.array([4])], 3, 100)
    assert counts.tolist() == [2, 3, 1]
    assert ids.tolist() == [1, 2, UNKNOWN, UNKNOWN, UNKNOWN, 4]
    counts, ids = pack_batch(np.array([[1, 2], [3, 4], [5, 6]]), 3, 100)
    assert (counts.tolist(), ids.tolist()) == ([2, 2, 2], [1, 2, 3, 4, 5, 6])


def test_a_count_beyond_the_limit_is_not_even_made() -> None:
    with pytest.raises(SequenceTooLong) as raised:
        pack_batch([10**15], 1, 64)
    assert (raised.value.length, raised.value.limit) == (10**15, 64)


def test_late_ids_fill_what_was_unknown() -> None:
    ids = np.array([UNKNOWN, UNKNOWN, 7, UNKNOWN, UNKNOWN], dtype=np.int32)
    starts, everyone = [0, 2, 3, 5], np.array([True, True, True])
    assert fill_in(ids, starts, [[1, 2], None, None], everyone).tolist() == [1, 2, 7, -1, -1]
    assert fill_in(ids, starts, None, everyone).tolist() == ids.tolist()
    skipped = np.array([True, False, False])
    assert fill_in(ids, starts, [[1, 2], "no", [3, 4, 5]], skipped).tolist() == [1, 2, 7, -1, -1]
    assert ids.tolist() == [-1, -1, 7, -1, -1]


@KINDS
def test_an_array_may_be_reused_after_reserve(make: Make) -> None:
    manager = make(9, 2)
    buffer = np.array([[1, 2]], dtype=np.int32)
    plan = manager.reserve([manager.add()], buffer)
    buffer[:] = 7
    manager.commit(plan)
    assert cached_tokens(manager, [1, 2, 0]) == 2
    assert cached_tokens(manager, [7, 7, 0]) == 0


@KINDS
def test_an_array_may_be_reused_after_add(make: Make) -> None:
    manager = make(9, 2)
    buffer = np.array([1, 2, 3], dtype=np.int32)
    sequence = manager.add(buffer)
    buffer[:] = [5, 6, 7]
    run(manager, [sequence], [[5, 6, 7]])
    manager.check()
    assert cached_tokens(manager, [5, 6, 0]) == 2
    assert cached_tokens(manager, [1, 2, 0]) == 0


@KINDS
def test_an_array_may_be_reused_after_commit(make: Make) -> None:
    manager = make(9, 2)
    buffer = np.array([1, 2], dtype=np.int32)
    manager.commit(manager.reserve([manager.add()], [2]), [buffer])
    buffer[:] = 7
    manager.check()
    assert cached_tokens(manager, [1, 2, 0]) == 2
