"""What can be found in which tier, told as it changes: for routers, for caches of caches, for dashboards.

Whoever starts from a subscription's snapshot and applies every event has, at any time, exactly the names that each tier
could match. Numbers have no gaps; a listener that falls behind by more than it asked for is told that it lost events,
and subscribes again. Nothing is made while nobody listens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from .errors import EventsLost

Kind = Literal["stored", "removed", "cleared", "moved"]


@dataclass(frozen=True, slots=True)
class Event:
    """One change. Names are 32 bytes each, in token order."""

    number: int
    kind: Kind
    """stored: ``tier`` has them now; moved: ``target`` has them now, as well as ``tier``, from where they were copied;
    removed: ``tier`` no longer has them; cleared: ``tier`` has nothing."""
    tier: str
    reason: str
    """computed, snapshot; evicted, cleared, moved (up, from an exclusive host cache); swapped, demoted, promoted."""
    names: tuple[bytes, ...] = ()
    parent: bytes | None = None
    """The name before the first; None at the start of a prompt, and in a layer group with a window."""
    tokens: tuple[int, ...] = ()
    """Of stored blocks."""
    block_size: int = 0
    group: int = 0
    """Layer group; every group has its own names."""
    target: str | None = None


class Subscription:
    """What one listener has still to read. ``snapshot`` is what there was when it began, as stored events."""

    def __init__(self, snapshot: tuple[Event, ...], limit: int) -> None:
        self.snapshot = snapshot
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._lost = False

    def put(self, event: Event) -> None:
        """Called by the log, under the manager's lock."""
        if len(self._waiting) < self._limit:
            self._waiting.append(event)
        else:
            self._lost = True

    def drain(self, most: int | None = None) -> list[Event]:
        """The oldest events, at most ``most`` of them. Raises ``EventsLost`` once those that fitted are read."""
        count = len(self._waiting) if most is None else min(most, len(self._waiting))
        if self._lost and not count:
            raise EventsLost(self._limit)
        return [self._waiting.popleft() for _ in range(count)]


class EventLog:
    """Hands every change to all listeners."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last event."""
        self._listeners: list[Subscription] = []

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def subscribe(self, snapshot: tuple[Event, ...], limit: int) -> Subscription:
        """A listener for what comes after ``snapshot``."""
        subscription = Subscription(snapshot, limit)
        self._listeners.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """It gets no more events; harmless if it was not subscribed."""
        self._listeners = [listener for listener in self._listeners if listener is not subscription]

    def tell(self, event: Event) -> None:
        """Number a change and hand it on."""
        self.number += 1
        numbered = replace(event, number=self.number)
        for listener in self._listeners:
            listener.put(numbered)
