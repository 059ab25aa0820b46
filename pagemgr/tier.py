"""A tier: a pool of blocks and the names of what they hold. Device and host are the same thing twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from zlib import crc32

import numpy as np
import numpy.typing as npt

from .errors import InternalError
from .events import Event, EventLog
from .eviction import Blocks, make_policy
from .ids import TokenArray
from .layout import NULL_BLOCK
from .pool import BlockPool, BlockState, Ints
from .prefix import DIGEST_BYTES, PrefixIndex, split_names

Groups = npt.NDArray[np.uint8]
Origin = tuple[str, str] | None
"""The tier that content was copied from, and why; None if it was computed."""


class Tier:
    """Pool and index, kept in agreement: a block that is given out anew loses its name."""

    def __init__(
        self, name: str, num_blocks: int, policy: str, index: PrefixIndex, events: EventLog, debug: int
    ) -> None:
        self.name = name
        self.events = events
        self.index = index
        self.pool = BlockPool(num_blocks, make_policy(policy, num_blocks, index), name, debug)
        self._ghosts = np.zeros(1 << (num_blocks - 1).bit_length(), dtype=np.uint32)
        """Fingerprints of the names that were evicted last: a lossy table, a place by name."""
        self.digest = 0
        """Running checksum of every block given out or shared, in order: equal on ranks that decided alike."""

    def take(self, blocks: Blocks) -> None:
        """Give out what ``pool.peek`` returned."""
        evicted = self.pool.take(blocks)
        if len(evicted):
            places, prints = self._ghosts_of(self.index.names_of(evicted))
            self._ghosts[places] = prints
        if self.events.heard:
            self._tell_removed(evicted, "evicted")
        self.index.forget(evicted)
        self.note(blocks)

    def wanted_again(self, names: bytes) -> int:
        """How many of these names were evicted not long ago; each is counted once for each time that it was."""
        places, prints = self._ghosts_of(names)
        again = places[self._ghosts[places] == prints]
        self._ghosts[again] = 0
        return len(again)

    def _ghosts_of(self, names: bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        digests = np.frombuffer(names, dtype="<u8").reshape(-1, DIGEST_BYTES // 8)
        prints: npt.NDArray[np.uint32] = (digests[:, 1] | np.uint64(1)).astype(np.uint32)  # 0 is an empty place
        return digests[:, 0] & np.uint64(len(self._ghosts) - 1), prints

    def share(self, blocks: Blocks, times: Ints | int = 1) -> None:
        """More references to distinct blocks that hold something."""
        self.pool.acquire(blocks, times)
        self.note(blocks)

    def note(self, blocks: Blocks) -> None:
        """These blocks were given out or shared, in this order."""
        self.digest = crc32(blocks.tobytes(), self.digest)

    def publish(self, blocks: Blocks, names: bytes, parents: Blocks, groups: Groups, origin: Origin = None) -> Blocks:
        """Make open blocks full under these names. Returns who stands for each name: the block, or one that did.

        ``parents[i]`` is the block before ``blocks[i]`` in its prefix, which may be one of ``blocks`` itself;
        ``groups[i]`` is its layer group. ``origin`` is the tier where it was copied from, and why.
        """
        kept = self.index.publish(blocks, names)
        new = kept == blocks
        stands = dict(zip(blocks[~new].tolist(), kept[~new].tolist(), strict=True))
        self.index.parents[blocks[new]] = [stands.get(parent, parent) for parent in parents[new].tolist()]
        self.index.groups[blocks[new]] = groups[new]
        self.pool.seal(blocks[new])
        if self.events.heard:
            self.tell_stored(blocks[new], origin)
        return kept

    def tell_stored(self, blocks: Blocks, origin: Origin = None) -> None:
        """These blocks can be found now. One event for each run of blocks that follow each other."""
        parents = self.index.parents[blocks]
        breaks = np.flatnonzero((parents[1:] != blocks[:-1]) | (parents[1:] == NULL_BLOCK)) + 1
        for run in np.split(blocks, breaks) if len(blocks) else ():
            stored = self._stored(run, "computed")
            if origin is not None:
                source, reason = origin
                stored = replace(stored, kind="moved", tier=source, target=self.name, reason=reason, tokens=())
            self.events.tell(stored)

    def snapshot(self) -> Iterator[Event]:
        """All that can be found, as stored events, parents before their children."""
        published = np.flatnonzero(self.pool.published).astype(np.int32)
        children: dict[int, list[int]] = {}
        for block, parent in zip(published.tolist(), self.index.parents[published].tolist(), strict=True):
            children.setdefault(parent, []).append(block)
        starts = children.get(NULL_BLOCK, [])[::-1]
        while starts:
            run = [starts.pop()]
            while len(after := children.get(run[-1], [])) == 1:
                run += after
            yield self._stored(np.array(run, dtype=np.int32), "snapshot")
            starts += after[::-1]

    def _stored(self, run: Blocks, reason: str) -> Event:
        index, before = self.index, int(self.index.parents[run[0]])
        return Event(
            number=self.events.number,
            kind="stored",
            tier=self.name,
            reason=reason,
            names=tuple(split_names(index.names_of(run))),
            parent=None if before == NULL_BLOCK else index.names[before].tobytes(),
            tokens=tuple(index.tokens[run].reshape(-1).tolist()),
            block_size=index.block_size,
            group=int(index.groups[run[0]]),
        )

    def _tell_removed(self, blocks: Blocks, reason: str) -> None:
        if len(blocks):
            names = tuple(split_names(self.index.names_of(blocks)))
            self.events.tell(Event(0, "removed", self.name, reason, names, block_size=self.index.block_size))

    def retract(self, blocks: Blocks, reason: str) -> None:
        """Published blocks lose their names: nobody finds them any more."""
        if self.events.heard:
            if reason == "cleared" and len(blocks) == self.index.num_published() > 0:
                self.events.tell(Event(0, "cleared", self.name, reason))
            else:
                self._tell_removed(blocks, reason)
        self.index.forget(blocks)
        self.pool.retract(blocks)

    def clear(self) -> int:
        """Forget what nobody holds; returns how many blocks that were."""
        cached = self.pool.policy.victims(self.pool.counts[BlockState.cached])
        self.retract(cached, "cleared")
        return len(cached)

    def tail(self, parent: bytes, tokens: TokenArray) -> tuple[int, int]:
        """A published block that follows the prefix named ``parent``, and how many of its leading tokens are these.

        The second is 0 if none is known.
        """
        block = self.index.head(parent, int(tokens[0]))
        if block < 0 or not self.pool.published[block]:
            return block, 0
        held = self.index.tokens[block]
        if self.index.hash(parent, held) != self.index.names[block].tobytes():
            return block, 0
        alike = held[: len(tokens)] == tokens
        return block, len(tokens) if alike.all() else int(np.argmin(alike))

    def check(self, references: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Raise ``InternalError`` unless pool and index are sound and agree."""
        self.pool.check(references)
        self.index.check(np.flatnonzero(self.pool.published).astype(np.int32))
        if (self.index.tokens < 0).any():
            raise InternalError(f"{self.name} tier: a negative token id")
