"""Pins: prefixes that stay on the device though no sequence uses them, each with an owner, a quota and an end.

A pin holds references, so that eviction never sees its blocks. Time is whatever the caller counts in: the manager only
compares it, so that ranks which are told the same times decide alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .errors import PinQuotaExceeded, StalePin
from .eviction import Blocks


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """What ``BlockManager.pin`` returns. ``length`` tokens of a prefix stay until it is taken out."""

    number: int
    owner: str
    length: int
    until: float | None
    """When it ends by itself, on the caller's clock."""
    blocks: Blocks = field(repr=False)


class Pins:
    """The pins there are. ``quota`` is in blocks, for each owner, a block that it pinned twice counting twice."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self._pins: dict[int, Pin] = {}
        self._by_owner: dict[str, int] = {}
        self._next = 1

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins.values())

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, pin: object) -> bool:
        return isinstance(pin, Pin) and self._pins.get(pin.number) is pin

    def require(self, owner: str, count: int) -> None:
        """Raise ``PinQuotaExceeded`` unless ``owner`` may pin ``count`` more blocks."""
        pinned = self._by_owner.get(owner, 0)
        if pinned + count > self.quota:
            raise PinQuotaExceeded(owner, count, pinned, self.quota)

    def add(self, owner: str, length: int, until: float | None, blocks: Blocks) -> Pin:
        """A new pin. The caller adds the references."""
        pin = Pin(self._next, owner, length, until, blocks)
        self._next += 1
        self._pins[pin.number] = pin
        self._by_owner[owner] = self._by_owner.get(owner, 0) + len(blocks)
        return pin

    def remove(self, pin: Pin) -> None:
        """Forget a pin. Raises ``StalePin`` if it has ended. The caller drops the references."""
        if pin not in self:
            raise StalePin(pin.number, pin.owner)
        del self._pins[pin.number]
        self._by_owner[pin.owner] -= len(pin.blocks)
        if not self.of(pin.owner):
            del self._by_owner[pin.owner]

    def ended(self, now: float) -> list[Pin]:
        """Pins whose time has come, oldest first."""
        return [pin for pin in self if pin.until is not None and pin.until <= now]

    def of(self, owner: str) -> list[Pin]:
        """The pins of one owner, oldest first."""
        return [pin for pin in self if pin.owner == owner]

    def blocks(self) -> Blocks:
        """The pinned blocks, once for each pin."""
        return np.concatenate([*(pin.blocks for pin in self), np.zeros(0, dtype=np.int32)])
