"""Names of blocks: a chained hash says what a block holds and everything before it.

    root  = SHA-256(format, block size, namespace)            nothing is shared across roots
    name  = SHA-256(name of the parent block ‖ packed int32 token ids of this block)

Only cryptographic hashes: a name is an identity, and a crafted collision would hand one user's K/V to another
(CVE-2025-25183). Token ids are packed and hashed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InternalError, InvalidInput
from .eviction import Blocks

TokenArray = npt.NDArray[np.int32]

DIGEST_BYTES = 32
_FORMAT = b"pagemgr prefix 1"


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

    def root(self, block_size: int) -> bytes:
        """The name that stands before the first block, 32 bytes."""
        frames = [b"t" + _framed(self.tenant.encode())] if self.tenant is not None else []
        frames += [b"a" + _framed(self.adapter.encode())] if self.adapter is not None else []
        frames += [b"m" + _framed(digest) for digest in self.media]
        return hashlib.sha256(_framed(_FORMAT) + block_size.to_bytes(8, "little") + b"".join(frames)).digest()


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def pack_tokens(tokens: Iterable[int] | npt.ArrayLike) -> TokenArray:
    """Token ids as int32 ``[n]``. Raises ``InvalidInput`` unless they are integers in [0, 2**31)."""
    try:
        array = np.asarray(tokens if hasattr(tokens, "__array__") else list(tokens))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"token ids must be one row of integers, got {tokens!r:.80}") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(f"token ids must be one row of integers, got {array.dtype} of shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise InvalidInput(f"token ids must be in [0, 2**31), got {low if low < 0 else high}")
    return np.ascontiguousarray(array, dtype=np.int32)


def hash_blocks(parent: bytes, tokens: TokenArray, block_size: int) -> list[bytes]:
    """Names of the full blocks of ``tokens``, the first of which follows ``parent``."""
    packed = tokens.astype("<i4", copy=False).tobytes()
    step = 4 * block_size
    names: list[bytes] = []
    sha256 = hashlib.sha256
    for start in range(0, len(packed) - step + 1, step):
        parent = sha256(parent + packed[start : start + step]).digest()
        names.append(parent)
    return names


class PrefixIndex:
    """Which block of a tier holds which prefix. A published block's parent is published as long as it is referenced."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = np.zeros((num_blocks, block_size), dtype=np.int32)
        """Committed token ids by block and offset; what lies beyond a sequence's end is stale."""
        self._names = np.zeros((num_blocks, DIGEST_BYTES), dtype=np.uint8)
        self._blocks: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, names: list[bytes]) -> Blocks:
        """Blocks of the longest leading run of ``names`` that is here."""
        found: list[int] = []
        get = self._blocks.get
        for name in names:
            block = get(name)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int32)

    def find(self, name: bytes) -> int | None:
        """The block published under ``name``."""
        return self._blocks.get(name)

    def name(self, block: int) -> bytes:
        """The name that a published block has."""
        return bytes(self._names[block])

    def publish(self, blocks: Blocks, names: list[bytes]) -> Blocks:
        """Put distinct names on blocks. Returns who stands for each name now: the block, or one that already did."""
        setdefault = self._blocks.setdefault
        kept = np.array([setdefault(name, block) for name, block in zip(names, blocks.tolist(), strict=True)], np.int32)
        new = kept == blocks
        digests = np.frombuffer(b"".join(names), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        self._names[blocks[new]] = digests[new]
        return kept

    def forget(self, blocks: Blocks) -> None:
        """These blocks were evicted."""
        packed = self._names[blocks].tobytes()
        for start in range(0, len(packed), DIGEST_BYTES):
            del self._blocks[packed[start : start + DIGEST_BYTES]]

    def check(self, published: Blocks) -> None:
        """Raise ``InternalError`` unless names and published blocks are one to one."""
        if sorted(self._blocks.values()) != published.tolist():
            raise InternalError("the prefix index and the published blocks differ")
        if any(self.name(block) != name for name, block in self._blocks.items()):
            raise InternalError("a block carries another name than the prefix index has for it")
