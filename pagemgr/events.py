"""What happens to published blocks, for whoever routes requests to where their prefix is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Event:
    """One change. ``names`` are 32 bytes each, in the order of their prefix."""

    number: int
    """Counts up without gaps."""
    kind: Literal["stored", "removed", "cleared", "moved"]
    tier: str
    reason: str
    names: tuple[bytes, ...]
    parent: bytes | None
    """The name before ``names[0]``, None at a root."""
    tokens: tuple[int, ...]
    """Of stored blocks alone."""
    block_size: int
    group: int
    target: str | None
    """The tier that moved blocks went to."""
