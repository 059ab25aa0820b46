"""A search for a disagreement between a manager and what it promises: many random calls from one seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pagemgr.errors import InvalidInput, PagemgrError
from pagemgr.manager import BlockManager

from .driver import Driver
from .engine import Engine

KINDS: dict[str, type[Driver] | type[Engine]] = {"model": Driver, "bytes": Engine}
"""By what a manager is judged: a model that says what every call must come to, or what its sequences read."""


class Disagreement(Exception):
    """The manager did not do what it should. The cause is chained; ``step`` counts from 1."""

    def __init__(self, kind: str, seed: int, step: int, verb: str, cause: BaseException) -> None:
        self.kind, self.seed, self.step = kind, seed, step
        super().__init__(f"{kind}, seed {seed}, step {step} ({verb}): {type(cause).__name__}: {cause}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did, once all sequences were freed again."""

    sizes: dict[str, Any]
    steps: int
    verbs: dict[str, int]
    """How often each was called for."""
    refused: dict[str, int]
    """Calls that were refused as they had to be, by the error's name."""
    evicted: int
    digest: str
    """Equal for equal seeds and steps, on any machine."""


def fuzz(kind: str, seed: int, steps: Iterable[int], check_every: int) -> Outcome:
    """Call a manager for each of ``steps``, which count up from 1, and compare everything each ``check_every``.

    In the end everything is freed, and each block has to be free or cached again. Raises ``Disagreement``, and
    ``InvalidInput`` where Python is told to skip assertions, as there is no comparison without them.
    """
    if not __debug__:
        raise InvalidInput("what is compared is asserted: run Python without -O")
    caller = KINDS[kind](seed)
    step, verb = 0, "start"
    try:
        for step in steps:
            verb = caller.act()
            if step % check_every == 0:
                caller.check()
        verb = "the end"
        caller.end()
        evicted, digest = baseline(caller.manager)
    except (AssertionError, PagemgrError, LookupError, TypeError, ValueError) as error:
        raise Disagreement(kind, seed, step, verb, error) from error
    return Outcome(caller.sizes, step, dict(caller.done), dict(caller.refused), evicted, digest)


def baseline(manager: BlockManager) -> tuple[int, str]:
    """See that nobody holds a block any more; returns how many were evicted, and the digest."""
    manager.check()
    stats = manager.stats()
    for tier in stats.tiers:
        left = tier.free + tier.cached + tier.null
        assert left == tier.num_blocks, f"{tier.num_blocks - left} blocks of the {tier.name} tier are lost"
    return sum(tier.evicted_total for tier in stats.tiers), stats.digest
