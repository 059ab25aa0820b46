"""Names of blocks: a chained hash says what a block holds and everything before it.

    root  = SHA-256(format, block size, namespace)            nothing is shared across roots
    name  = SHA-256(name of the parent block ‖ packed int32 token ids of this block)

Only cryptographic hashes: a name is an identity, and a crafted collision would hand one user's K/V to another
(CVE-2025-25183). Token ids are packed and hashed once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InternalError
from .eviction import Blocks
from .ids import TokenArray

DIGEST_BYTES = 32
_FORMAT = b"pagemgr prefix 1"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Namespace:
    """What may share a prefix: sequences whose namespaces are equal, field by field.

    Derive it from who is asking, on the server: a namespace that clients choose is no boundary. Every field is tagged
    and length-framed before hashing, so that ``adapter="x"`` and ``tenant="x"`` never meet.
    """

    tenant: str | None = None
    adapter: str | None = None
    """What else changes K/V for the same tokens: a LoRA adapter with its version."""
    media: tuple[bytes, ...] = ()
    """Digests of images or audio whose placeholder tokens stand in the prompt, in order."""

    def root(self, block_size: int, secret: bytes = b"") -> bytes:
        """The name that stands before the first block, 32 bytes.

        With a ``secret`` of 16 to 64 bytes it is a MAC (BLAKE2b), so that nobody without it can tell from a name what
        was asked for, or make one; the names that follow are SHA-256 chains from it all the same.
        """
        frames = [b"t" + _framed(self.tenant.encode())] if self.tenant is not None else []
        frames += [b"a" + _framed(self.adapter.encode())] if self.adapter is not None else []
        frames += [b"m" + _framed(digest) for digest in self.media]
        framed = _framed(_FORMAT) + block_size.to_bytes(8, "little") + b"".join(frames)
        if secret:
            return hashlib.blake2b(framed, digest_size=DIGEST_BYTES, key=secret).digest()
        return hashlib.sha256(framed).digest()


def group_roots(root: bytes, num_groups: int) -> list[bytes]:
    """The root of each layer group: blocks of different groups hold different layers, so their names differ."""
    tagged = [
        hashlib.sha256(_framed(root) + b"g" + group.to_bytes(8, "little")).digest() for group in range(1, num_groups)
    ]
    return [root, *tagged]


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def hash_blocks(parent: bytes, tokens: TokenArray, block_size: int) -> bytes:
    """Names of the full blocks of ``tokens``, the first of which follows ``parent``: packed, 32 bytes each."""
    packed = tokens.astype("<i4", copy=False).tobytes()
    step = 4 * block_size
    names: list[bytes] = []
    sha256 = hashlib.sha256
    for start in range(0, len(packed) - step + 1, step):
        parent = sha256(parent + packed[start : start + step]).digest()
        names.append(parent)
    return b"".join(names)


def split_names(names: bytes) -> list[bytes]:
    """Packed names, one by one."""
    return [names[start : start + DIGEST_BYTES] for start in range(0, len(names), DIGEST_BYTES)]


class PrefixIndex:
    """Which block of a tier holds which prefix. A published block's parent is published as long as it is referenced.

    Several names are passed packed: 32 bytes each, one after another.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = np.zeros((num_blocks, block_size), dtype=np.int32)
        """Committed token ids by block and offset; what lies beyond a sequence's end is stale."""
        self.names = np.zeros((num_blocks, DIGEST_BYTES), dtype=np.uint8)
        self.parents = np.zeros(num_blocks, dtype=np.int32)
        """The block before each published one in its prefix, the null block before the first."""
        self.groups = np.zeros(num_blocks, dtype=np.uint8)
        """The layer group of each published block."""
        self.heads = np.full(1 << (num_blocks - 1).bit_length(), -1, dtype=np.int32)
        """A lossy table: the block published last under a parent's name and a first token. What it says must be
        verified, so nothing has to be taken out of it."""
        self._blocks: dict[bytes, int] = {}

    def hash(self, parent: bytes, tokens: TokenArray) -> bytes:
        """Names of the full blocks of ``tokens``; see ``hash_blocks``."""
        return hash_blocks(parent, tokens, self.block_size)

    def find(self, names: bytes) -> Blocks:
        """The blocks published under ``names``, -1 where there is none."""
        get = self._blocks.get
        return np.array([get(name, -1) for name in split_names(names)], dtype=np.int32)

    def match(self, names: bytes) -> Blocks:
        """Blocks of the longest leading run of ``names`` that is published."""
        found = self.find(names)
        missing = np.flatnonzero(found < 0)
        return found[: missing[0]] if len(missing) else found

    def names_of(self, blocks: Blocks) -> bytes:
        """The names that published blocks have."""
        return self.names[blocks].tobytes()

    def publish(self, blocks: Blocks, names: bytes) -> Blocks:
        """Put names on blocks. Returns who stands for each name now: the block, or one that already did."""
        setdefault = self._blocks.setdefault
        pairs = zip(split_names(names), blocks.tolist(), strict=True)
        kept = np.array([setdefault(name, block) for name, block in pairs], dtype=np.int32)
        new = kept == blocks
        self.names[blocks[new]] = np.frombuffer(names, dtype=np.uint8).reshape(-1, DIGEST_BYTES)[new]
        return kept

    def describe(self, blocks: Blocks, source: PrefixIndex, sources: Blocks) -> None:
        """These blocks hold, or will, what ``sources`` hold in another tier."""
        self.tokens[blocks] = source.tokens[sources]
        self.groups[blocks] = source.groups[sources]

    def lead(self, blocks: Blocks, parents: bytes) -> None:
        """These published blocks, which follow the prefixes named ``parents``, can be found by their first tokens."""
        self.heads[self._places(parents, self.tokens[blocks, 0])] = blocks

    def head(self, parent: bytes, token: int) -> int:
        """The block that may follow the prefix named ``parent`` and begin with ``token``, or -1."""
        return int(self.heads[self._places(parent, np.array([token], dtype=np.int32))[0]])

    def _places(self, parents: bytes, tokens: TokenArray) -> npt.NDArray[np.uint64]:
        digests = np.frombuffer(parents, dtype="<u8")[:: DIGEST_BYTES // 8]
        mixed: npt.NDArray[np.uint64] = digests ^ (tokens.astype(np.uint64) * _GOLDEN)
        return mixed & np.uint64(len(self.heads) - 1)

    def forget(self, blocks: Blocks) -> None:
        """These blocks were evicted."""
        for name in split_names(self.names_of(blocks)):
            del self._blocks[name]

    def check(self, published: Blocks) -> None:
        """Raise ``InternalError`` unless names and published blocks are one to one."""
        if self.num_published() != len(published) or not np.array_equal(self.find(self.names_of(published)), published):
            raise InternalError("the prefix index and the published blocks differ")

    def num_published(self) -> int:
        """Names there are."""
        return len(self._blocks)
