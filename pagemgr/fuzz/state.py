"""What a model of the manager consists of: rows, steps in flight, moves under way, and the blocks of each tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pagemgr.prefix import Namespace

Name = tuple[Namespace, tuple[int, ...]]
Passed = Callable[[], bool]


@dataclass(eq=False)
class Row:
    """One sequence. ``tokens`` are the real ones, known to the manager or not, those of steps in flight included."""

    namespace: Namespace = field(repr=False)
    tokens: list[int]
    blocks: list[int]
    computed: int
    known: int
    tier: str = "device"
    moving: bool = field(default=False, repr=False)
    live: bool = field(default=True, repr=False)


@dataclass(eq=False)
class Part:
    """What a step in flight did to one row."""

    row: Row
    start: int
    new: list[int]
    early: bool  # the ids were given at reserve
    tail: int | None  # the block that copy-on-write replaced


@dataclass(eq=False)
class Flight:
    """One step in flight."""

    number: int
    parts: list[Part]


@dataclass(eq=False)
class Move:
    """One transfer under way: ``moved[i]`` is what ``rows[i]`` will consist of in the target tier."""

    rows: list[Row]
    target: str
    moved: list[list[int]]
    pairs: dict[int, int]  # copied: block of the source -> block of the target
    names: dict[int, Name]  # of the target's copies


@dataclass(eq=False)
class Pool:
    """One tier: who has a name, who may be evicted in which order, and what is let go of under which fences."""

    size: int
    names: dict[int, Name] = field(default_factory=dict)
    lru: list[int] = field(default_factory=list)
    holds: list[tuple[tuple[Passed, ...], list[int]]] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    def held(self, block: int) -> bool:
        """Whether it waits for a fence."""
        return any(block in blocks for _, blocks in self.holds)

    def find(self, name: Name) -> int | None:
        """Who has this name."""
        return next((block for block, other in self.names.items() if other == name), None)
