"""What a pool is watched for, above the checks that are always on: bytes written after a block was freed, and by whom.

    level 0   counts only: the checks of references and states are off
    level 1   checks in constant time on every call
    level 2   blocks are poisoned once they are free, and must still be poisoned when they are given out again
    level 3   freed blocks are reused as late as can be, and errors tell what happened to their blocks before

A watch belongs to a pool and knows no bytes: whoever keeps them asks what to poison and what to inspect.
"""

from __future__ import annotations

import os
import traceback
from collections import deque

from .errors import InternalError
from .eviction import Blocks

COUNTS, CHECKS, POISON, HISTORY = range(4)
KEPT = 8
"""Happenings that are remembered of each block."""

_HERE = os.path.dirname(__file__)


class Watch:
    """Levels 2 and 3 of one pool."""

    def __init__(self, level: int) -> None:
        self.quarantine = level >= HISTORY
        self._freed: set[int] = set()
        self._poisoned: set[int] = set()
        self._suspect: list[int] = []
        self._history: dict[int, deque[str]] = {}

    def freed(self, blocks: Blocks) -> None:
        """These are blank: nobody may write to them."""
        self._freed.update(blocks.tolist())

    def taken(self, blocks: Blocks) -> None:
        """These are given out."""
        given = set(blocks.tolist())
        self._suspect += sorted(given & self._poisoned)
        self._poisoned -= given
        self._freed -= given

    def to_poison(self) -> list[int]:
        """Blank blocks that are not poisoned yet; they will be now."""
        blocks = sorted(self._freed)
        self._poisoned |= self._freed
        self._freed = set()
        return blocks

    def to_inspect(self) -> list[int]:
        """Blocks that were given out and must still be poisoned."""
        blocks, self._suspect = self._suspect, []
        return blocks

    def note(self, blocks: Blocks, what: str) -> None:
        """Remember what happened to these blocks, and which line outside pagemgr asked for it."""
        if self.quarantine:
            callers = (frame for frame in reversed(traceback.extract_stack()) if not frame.filename.startswith(_HERE))
            caller = next(callers, None)
            line = what if caller is None else f"{what} at {caller.filename}:{caller.lineno} in {caller.name}"
            for block in blocks.tolist():
                self._history.setdefault(block, deque(maxlen=KEPT)).append(line)

    def written(self, tier: str, block: int) -> InternalError:
        """The error to raise for a block that is no longer as it was poisoned."""
        return InternalError(f"block {block} of {tier} was written after it was freed{self.tell([block])}")

    def tell(self, blocks: list[int]) -> str:
        """What is remembered of these blocks, to end a message with."""
        lines = [f"\n  block {block}: {event}" for block in blocks for event in self._history.get(block, ())]
        return ":" + "".join(lines) if lines else ""
