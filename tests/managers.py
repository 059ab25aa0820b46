"""Managers for tests, with and without the compiled loops, and the few calls that tests make again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from pagemgr.ids import BatchTokens, Tokens
from pagemgr.manager import BlockManager
from pagemgr.plan import Plan
from pagemgr.pool import BlockState
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

Make = Callable[..., BlockManager]


KINDS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(BlockManager, compiled=flag), id=kind)
        for kind, flag in (("python", False), ("compiled", True))
    ],
)
"""Runs a test for both kinds of manager. Where there is no compiler, they are the same."""


class Gate:
    """A fence that passes when the test says so."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


def run(manager: BlockManager, sequences: list[Sequence], tokens: BatchTokens) -> Plan:
    """One whole step."""
    plan = manager.reserve(sequences, tokens)
    manager.commit(plan)
    return plan


def filled(manager: BlockManager, prompt: Tokens, namespace: Namespace | None = None) -> Sequence:
    """A sequence that has run its whole prompt."""
    ids = list(prompt)
    sequence = manager.add(ids, namespace)
    run(manager, [sequence], [ids[sequence.num_cached_tokens :]])
    return sequence


def blocks(manager: BlockManager, sequence: Sequence) -> list[int]:
    """Its row of the block table."""
    row = manager.table.blocks[sequence.row]
    return row[row > 0].tolist()


def cached_tokens(manager: BlockManager, prompt: Tokens, namespace: Namespace | None = None) -> int:
    """How much of a prompt the cache holds; leaves nothing behind but the order of eviction."""
    sequence = manager.add(prompt, namespace)
    manager.free([sequence])
    return sequence.num_cached_tokens


def states(manager: BlockManager, tier: int = 0) -> dict[str, int]:
    """Blocks by state, without the states that no block is in and the null block."""
    stats = manager.stats().tiers[tier]
    counts = {state.name: getattr(stats, state.name) for state in BlockState if state is not BlockState.null}
    return {name: count for name, count in counts.items() if count}


def copies(plan: Plan) -> list[tuple[int, int]]:
    """Copy-on-write of a plan: (from, to)."""
    return [(a, b) for copied in plan.copies for a, b in copied.pairs.tolist()]
