"""A tier: a pool of blocks and the names of what they hold. Device and host are the same thing twice."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from .errors import InternalError
from .eviction import Blocks, make_policy
from .ids import TokenArray
from .pool import BlockPool, BlockState, Ints
from .prefix import PrefixIndex


class Tier:
    """Pool and index, kept in agreement: a block that is given out anew loses its name."""

    def __init__(self, name: str, num_blocks: int, policy: str, index: PrefixIndex) -> None:
        self.name = name
        self.index = index
        self.pool = BlockPool(num_blocks, make_policy(policy, num_blocks, index), name)
        self.digest = 0
        """Running checksum of every block given out or shared, in order: equal on ranks that decided alike."""

    def take(self, blocks: Blocks) -> None:
        """Give out what ``pool.peek`` returned."""
        self.index.forget(self.pool.take(blocks))
        self.note(blocks)

    def share(self, blocks: Blocks, times: Ints | int = 1) -> None:
        """More references to distinct blocks that hold something."""
        self.pool.acquire(blocks, times)
        self.note(blocks)

    def note(self, blocks: Blocks) -> None:
        """These blocks were given out or shared, in this order."""
        self.digest = crc32(blocks.tobytes(), self.digest)

    def publish(self, blocks: Blocks, names: bytes, parents: Blocks) -> Blocks:
        """Make open blocks full under these names. Returns who stands for each name: the block, or one that did.

        ``parents[i]`` is the block before ``blocks[i]`` in its prefix, which may be one of ``blocks`` itself.
        """
        kept = self.index.publish(blocks, names)
        new = kept == blocks
        stands = dict(zip(blocks[~new].tolist(), kept[~new].tolist(), strict=True))
        self.index.parents[blocks[new]] = [stands.get(parent, parent) for parent in parents[new].tolist()]
        self.pool.seal(blocks[new])
        return kept

    def retract(self, blocks: Blocks) -> None:
        """Published blocks lose their names: nobody finds them any more."""
        self.index.forget(blocks)
        self.pool.retract(blocks)

    def clear(self) -> int:
        """Forget what nobody holds; returns how many blocks that were."""
        cached = self.pool.policy.victims(self.pool.counts[BlockState.cached])
        self.retract(cached)
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
