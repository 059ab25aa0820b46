"""Whoever listens to a manager's events: what a router would know."""

from __future__ import annotations

import numpy as np

from pagemgr.events import Event
from pagemgr.manager import BlockManager
from pagemgr.prefix import hash_blocks


class Listener:
    """Which names each tier has, from a snapshot and the events after it."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.subscription = manager.subscribe()
        self.number = manager.events.number
        self.known: dict[str, set[bytes]] = {tier.name: set() for tier in manager.tiers}
        for event in self.subscription.snapshot:
            assert (event.kind, event.reason, event.number) == ("stored", "snapshot", self.number)
            self._store(event.tier, event)

    def read(self) -> list[Event]:
        """Apply what has come, and see that it comes one by one and makes sense."""
        events = self.subscription.drain()
        for event in events:
            self.number += 1
            assert event.number == self.number
            match event.kind:
                case "stored":
                    assert len(event.tokens) == len(event.names) * self.manager.block_size
                    if event.parent is not None:
                        tokens = np.array(event.tokens, dtype=np.int32)
                        assert hash_blocks(event.parent, tokens, event.block_size) == b"".join(event.names)
                    self._store(event.tier, event)
                case "moved":
                    assert event.target is not None
                    self._store(event.target, event)
                case "removed":
                    assert set(event.names) <= self.known[event.tier]
                    self.known[event.tier] -= set(event.names)
                case "cleared":
                    self.known[event.tier].clear()
        return events

    def leave(self) -> None:
        """Listen no more."""
        self.manager.unsubscribe(self.subscription)

    def _store(self, tier: str, event: Event) -> None:
        assert not set(event.names) & self.known[tier]
        assert event.parent is None or event.parent in self.known[tier], "a child came before its parent"
        self.known[tier] |= set(event.names)

    def check(self) -> None:
        """What is known is what there is."""
        self.read()
        for tier in self.manager.tiers:
            names = {tier.index.names[block].tobytes() for block in np.flatnonzero(tier.pool.published)}
            assert self.known[tier.name] == names, tier.name
