"""Names, by the lines of pagemgr/README.md and by vectors that other programs can test themselves against."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from pagemgr.prefix import Namespace, group_roots, hash_blocks

TOKENS = [1, 2, 3, 4, 70_000, 2**31 - 1]
VECTORS: dict[str, tuple[Namespace, bytes]] = {
    "nothing": (Namespace(), b""),
    "tenant x": (Namespace(tenant="x"), b""),
    "adapter x": (Namespace(adapter="x"), b""),
    "all": (Namespace(tenant="acme", adapter="lora-7", media=(b"\x01" * 32, b"\x02" * 32)), b""),
    "secret": (Namespace(tenant="x"), b"0123456789abcdef"),
}


def frame(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def by_the_page(space: Namespace, secret: bytes, group: int, block_size: int) -> list[bytes]:
    """Written from the page alone."""
    fields = b"" if space.tenant is None else b"t" + frame(space.tenant.encode())
    fields += b"" if space.adapter is None else b"a" + frame(space.adapter.encode())
    fields += b"".join(b"m" + frame(digest) for digest in space.media)
    data = frame(b"pagemgr prefix 1") + struct.pack("<Q", block_size) + fields
    root = hashlib.blake2b(data, digest_size=32, key=secret).digest() if secret else hashlib.sha256(data).digest()
    names = [hashlib.sha256(frame(root) + b"g" + struct.pack("<Q", group)).digest() if group else root]
    for at in range(0, len(TOKENS) - block_size + 1, block_size):
        block = struct.pack(f"<{block_size}i", *TOKENS[at : at + block_size])
        names.append(hashlib.sha256(names[-1] + block).digest())
    return names[1:]


@pytest.mark.parametrize("group", [0, 1, 5])
@pytest.mark.parametrize("name", VECTORS)
def test_names_are_as_the_page_says(name: str, group: int) -> None:
    space, secret = VECTORS[name]
    root = group_roots(space.root(2, secret), 6)[group]
    expected = b"".join(by_the_page(space, secret, group, 2))
    assert hash_blocks(root, np.array(TOKENS, dtype=np.int32), 2) == expected


def test_the_vectors_of_the_page(root: Path) -> None:
    """Last name of the six tokens in blocks of 2, group 0: on the page, so that a change here is a change of format."""
    page = (root / "pagemgr" / "README.md").read_text(encoding="utf-8")
    for name, (space, secret) in VECTORS.items():
        last = by_the_page(space, secret, 0, 2)[-1].hex()
        assert f"| {name} | `{last}` |" in page, f"| {name} | `{last}` |"
