"""What a policy is told, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int32]


class Prefixes(Protocol):
    """What cached blocks hold: arrays by block, to read, true of a block from ``insert`` until ``evict``."""

    @property
    def names(self) -> npt.NDArray[np.uint8]:
        """``[num_blocks, 32]``: equal names are equal content after an equal prefix, then and now, on every rank."""

    @property
    def parents(self) -> Blocks:
        """``[num_blocks]``: the block before each in its prefix, block 0 before the first."""


@runtime_checkable
class EvictionPolicy(Protocol):
    """Orders the cached blocks of one tier. It never decides whether a block may go: it is asked who goes first.

    What is inserted comes leaf first (children before parents) and is referenced by nobody; what is offered must be
    leaf first too. The same calls must give the same victims: no clock, no random numbers, no hash seeds.
    """

    def insert(self, blocks: Blocks) -> None:
        """These blocks became evictable, in this order."""

    def hit(self, blocks: Blocks) -> None:
        """These blocks are no longer evictable: somebody uses them again."""

    def evict(self, blocks: Blocks) -> None:
        """These blocks lose what they hold."""

    def victims(self, count: int) -> Blocks:
        """The ``count`` blocks to evict first, in order. Pure: nothing changes until ``evict``, asked however often."""


PolicyFactory = Callable[[int, Prefixes], EvictionPolicy]
"""Makes the policy of one tier from the number of its blocks and what they will hold."""
