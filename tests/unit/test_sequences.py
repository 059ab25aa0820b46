"""Rows of the block table, their handles, and batches of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagemgr.errors import InvalidInput, OutOfSequences, SequenceBusy, StaleSequence, WrongTier
from pagemgr.sequences import IDLE, MOVING, Batch, Prompt, Sequence, SequenceTable

ROOT = bytes(range(32))
TIERS = ("device", "host")


def table_of(*rows: list[int], max_sequences: int = 6) -> SequenceTable:
    """A table of two-token blocks whose first rows name these blocks."""
    table = SequenceTable(max_sequences, 5, TIERS)
    for blocks in rows:
        row = table.create(ROOT)
        table.blocks[row, : len(blocks)] = blocks
        table.num_blocks[row] = len(blocks)
        table.reserved[row] = table.computed[row] = table.committed[row] = 2 * len(blocks)
    return table


def rows(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def test_rows_are_given_out_and_taken_back() -> None:
    table = table_of([1], [2], max_sequences=3)
    assert table.num_live == 2
    table.require(1)
    with pytest.raises(OutOfSequences) as raised:
        table.require(2)
    assert (raised.value.requested, raised.value.available, raised.value.limit) == (2, 1, 3)
    table.destroy(rows(0))
    assert table.num_live == 1
    assert table.create(ROOT) == 0
    assert table.blocks[0].tolist() == [0] * 5
    assert (table.num_blocks[0], table.reserved[0], table.computed[0], table.committed[0]) == (0, 0, 0, 0)


def test_a_handle_outlives_its_sequence_as_stale() -> None:
    table = table_of([1], [2])
    old, other = table.handle(0, 4), table.handle(1)
    assert (old.row, old.generation, old.num_cached_tokens) == (0, 0, 4)
    assert table.rows([other, old]).tolist() == [1, 0]
    table.destroy(rows(0))
    with pytest.raises(StaleSequence):
        table.rows([other, old])
    table.create(ROOT)
    with pytest.raises(StaleSequence) as raised:
        table.rows([other, old])
    assert (raised.value.row, raised.value.generation) == (0, 0)
    assert table.rows([table.handle(0)]).tolist() == [0]


@pytest.mark.parametrize(("row", "generation"), [(-1, 0), (6, 0), (10**9, 0), (0, 1), (0, -1), (2, 0)])
def test_handles_that_were_never_given_are_stale(row: int, generation: int) -> None:
    with pytest.raises(StaleSequence, match=rf"row {row}, generation {generation}"):
        table_of([1]).rows([Sequence(row, generation)])


def test_handles_are_equal_by_row_and_generation() -> None:
    assert Sequence(1, 2, 3) == Sequence(1, 2)
    assert len({Sequence(1, 2, 3), Sequence(1, 2), Sequence(1, 3), Sequence(2, 2)}) == 3
    with pytest.raises(AttributeError):
        Sequence(1, 2).row = 3  # type: ignore[misc]


def test_a_batch_names_each_sequence_once() -> None:
    batch = Batch(iter([Sequence(3, 1), Sequence(0, 2)]))
    assert (batch.rows.tolist(), batch.generations.tolist(), len(batch)) == ([3, 0], [1, 2], 2)
    with pytest.raises(InvalidInput, match="named twice"):
        Batch([Sequence(3, 1), Sequence(0, 2), Sequence(3, 1)])


def test_a_stale_handle_beside_its_successor_is_stale() -> None:
    table = table_of([1])
    old = table.handle(0)
    table.destroy(rows(0))
    table.create(ROOT)
    with pytest.raises(StaleSequence):
        table.rows([table.handle(0), old])


def test_clones_are_equal_rows() -> None:
    table = table_of([1, 2], [7])
    table.prompts[0] = Prompt(np.arange(5, dtype=np.int32), b"\0" * 64)
    table.tier[0], table.computed[0], table.committed[0] = 1, 3, 2
    children = table.clone(0, 2)
    assert children == [2, 3]
    for child in children:
        for column in (table.num_blocks, table.reserved, table.computed, table.committed, table.tier):
            assert column[child] == column[0]
        assert table.blocks[child].tolist() == [1, 2, 0, 0, 0]
        assert table.roots[child].tobytes() == ROOT
        assert table.prompts[child] is table.prompts[0]
        assert table.live[child]
        assert table.last_step[child] == IDLE


def test_a_destroyed_row_leaves_no_prompt() -> None:
    table = table_of([1])
    table.prompts[0] = Prompt(np.arange(2, dtype=np.int32), b"\0" * 32)
    table.destroy(rows(0))
    assert not table.prompts


@pytest.mark.parametrize(
    ("named", "keep", "order", "times"),
    [
        ((0,), (0,), [3, 2, 1], 1),
        ((0,), (2,), [3], 1),
        ((0,), (3,), [], 1),
        ((0, 1), (0, 0), [3, 4, 2, 1], [1, 1, 2, 2]),
        ((1, 0), (0, 0), [4, 3, 2, 1], [1, 1, 2, 2]),
        ((0, 1), (1, 2), [3, 2, 4], [1, 1, 1]),
        ((), (), [], []),
    ],
)
def test_leaf_first(named: tuple[int, ...], keep: tuple[int, ...], order: list[int], times: int | list[int]) -> None:
    table = table_of([1, 2, 3], [1, 2, 4])
    blocks, mentions = table.leaf_first(rows(*named), rows(*keep))
    assert blocks.tolist() == order
    assert (mentions if isinstance(mentions, int) else mentions.tolist()) == times
    blocks[:] = 9  # nobody else's memory
    assert table.blocks[0].tolist() == [1, 2, 3, 0, 0]


def test_references_count_entries_of_a_tier() -> None:
    table = table_of([1, 2, 3], [1, 2, 4], [5])
    table.tier[2] = 1
    assert table.references(0, 6).tolist() == [0, 2, 2, 1, 1, 0]
    assert table.references(1, 6).tolist() == [0, 0, 0, 0, 0, 1]
    table.destroy(rows(0))
    assert table.references(0, 6).tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("last_step", "idle", "still"),
    [(IDLE, None, None), (7, "step 7 is in flight", None), (MOVING, "it is being swapped", "it is being swapped")],
)
def test_what_is_under_way(last_step: int, idle: str | None, still: str | None) -> None:
    table = table_of([1], [2])
    table.last_step[1] = last_step

    def refused(require: Callable[[np.ndarray, str], None], reason: str | None) -> None:
        if reason is None:
            return require(rows(0, 1), "fork")
        with pytest.raises(SequenceBusy, match=f"cannot fork the sequence in row 1: {reason}") as raised:
            require(rows(0, 1), "fork")
        assert (raised.value.row, raised.value.verb) == (1, "fork")

    refused(table.require_idle, idle)
    refused(table.require_still, still)


def test_the_wrong_tier_is_named() -> None:
    table = table_of([1], [2])
    table.tier[1] = 1
    table.require_tier(rows(0), 0)
    with pytest.raises(WrongTier) as raised:
        table.require_tier(rows(0, 1), 0)
    assert (raised.value.row, raised.value.tier, raised.value.needed) == (1, "host", "device")
