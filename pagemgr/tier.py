"""A tier: a pool of blocks and the names of what they hold. Device and host are the same thing twice."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from .errors import InternalError
from .eviction import Blocks, make_policy
from .pool import BlockPool
from .prefix import PrefixIndex


class Tier:
    """Pool and index, kept in agreement: a block that is given out anew loses its name."""

    def __init__(self, name: str, num_blocks: int, block_size: int, policy: str) -> None:
        self.name = name
        self.pool = BlockPool(num_blocks, make_policy(policy, num_blocks), name)
        self.index = PrefixIndex(num_blocks, block_size)
        self.digest = 0
        """Running checksum of every block given out or shared, in order: equal on ranks that decided alike."""

    def take(self, blocks: Blocks) -> None:
        """Give out what ``pool.peek`` returned."""
        self.index.forget(self.pool.take(blocks))
        self.digest = crc32(blocks.tobytes(), self.digest)

    def share(self, blocks: Blocks) -> None:
        """One more reference to blocks that hold something."""
        self.pool.acquire(blocks)
        self.digest = crc32(blocks.tobytes(), self.digest)

    def publish(self, blocks: Blocks, names: list[bytes]) -> Blocks:
        """Make open blocks full under distinct names. Returns who stands for each name: the block, or one that did."""
        kept = self.index.publish(blocks, names)
        self.pool.seal(blocks[kept == blocks])
        return kept

    def check(self, references: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Raise ``InternalError`` unless pool and index are sound and agree."""
        self.pool.check(references)
        self.index.check(np.flatnonzero(self.pool.published).astype(np.int32))
        if (self.index.tokens < 0).any():
            raise InternalError(f"{self.name} tier: a negative token id")
