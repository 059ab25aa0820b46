"""Names of blocks, to the byte, and the index that finds blocks by them."""

from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemgr.errors import InternalError
from pagemgr.prefix import DIGEST_BYTES, Namespace, PrefixIndex, hash_blocks, split_names

# What other programs (a router, a store of blocks) have to arrive at as well. Made with printf and sha256sum.
ROOTS = [
    (Namespace(), 16, "bc65bef9881870b0073ecb2cd89a057719e0275fd581c91aa6930abd3c904164"),
    (Namespace(tenant="acme"), 16, "33c109ef8188afe3005ba8d7846c02a4d453350282748480d1de3a9543aa8a81"),
    (
        Namespace(tenant="x", adapter="l1", media=(b"\xff", b"")),
        4,
        "17f2666244148de6d15327677e32aebb97cb2a5b3ed0887ef15e40b6a5a97c38",
    ),
]
ROOT_OF_2 = "487059e32f0d0337209fcb4d0891434c5f6bf545c4cc233aa45b19e2efc0e39b"
NAMES_OF_2 = [
    "93ed6071ef7a9bec3ca943d576c365d2a6a18e796c2f4828214272c5ae3ba9fb",
    "ae6d71b1591cf69ed52a574ba9da25a9d2e2adfb41bb0b0718258a1b48cc81dc",
]


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


@pytest.mark.parametrize(("namespace", "block_size", "root"), ROOTS)
def test_golden_roots(namespace: Namespace, block_size: int, root: str) -> None:
    assert namespace.root(block_size).hex() == root


def test_golden_names() -> None:
    root = Namespace().root(2)
    assert root.hex() == ROOT_OF_2
    assert [name.hex() for name in split_names(hash_blocks(root, tokens(1, 2, 3, 2**31 - 1, 9), 2))] == NAMES_OF_2


TEXT = st.none() | st.sampled_from(["", "x", "xa", "a", "\0", "t"])
NAMESPACES = st.builds(Namespace, TEXT, TEXT, st.lists(st.sampled_from([b"", b"x", b"a\1"]), max_size=2).map(tuple))


@given(NAMESPACES, NAMESPACES, st.integers(1, 3), st.integers(1, 3))
def test_roots_are_equal_where_namespaces_and_sizes_are(
    one: Namespace, other: Namespace, size: int, size_: int
) -> None:
    assert (one.root(size) == other.root(size_)) == (one == other and size == size_)


def test_fields_do_not_run_into_each_other() -> None:
    spaces = [
        Namespace(tenant="ab"),
        Namespace(tenant="a", adapter="b"),
        Namespace(adapter="ab"),
        Namespace(media=(b"ab",)),
        Namespace(media=(b"a", b"b")),
        Namespace(media=(b"b", b"a")),
        Namespace(tenant="a", media=(b"b",)),
        Namespace(tenant="aa\1\0\0\0\0\0\0\0b"),
    ]
    assert len({space.root(4) for space in spaces}) == len(spaces)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(1, 5), st.binary(min_size=32, max_size=32))
def test_names_chain(ids: list[int], size: int, parent: bytes) -> None:
    expected = []
    for start in range(0, len(ids) - size + 1, size):
        parent_and_tokens = (expected[-1] if expected else parent) + struct.pack(
            f"<{size}i", *ids[start : start + size]
        )
        expected.append(hashlib.sha256(parent_and_tokens).digest())
    assert split_names(hash_blocks(parent, tokens(*ids), size)) == expected


def test_names_of_a_part_continue_those_before_it() -> None:
    ids = tokens(*range(12))
    whole = hash_blocks(b"\0" * 32, ids, 3)
    first = hash_blocks(b"\0" * 32, ids[:6], 3)
    assert whole == first + hash_blocks(first[-DIGEST_BYTES:], ids[6:], 3)
    assert hash_blocks(b"\0" * 32, np.repeat(ids, 2)[::2], 3) == whole  # not contiguous


# The index ----------------------------------------------------------------------------------------------------------


def name(i: int) -> bytes:
    return hashlib.sha256(bytes([i])).digest()


def named(*ids: int) -> bytes:
    return b"".join(map(name, ids))


def test_publish_finds_who_was_first() -> None:
    index = PrefixIndex(9, 2)
    assert index.publish(tokens(3, 4), named(0, 1)).tolist() == [3, 4]
    assert index.publish(tokens(5, 6, 7), named(2, 1, 2)).tolist() == [5, 4, 5]
    assert index.find(named(2, 9, 1, 0)).tolist() == [5, -1, 4, 3]
    assert index.names_of(tokens(4, 3)) == named(1, 0)
    index.check(tokens(3, 4, 5))


def test_match_is_the_leading_run() -> None:
    index = PrefixIndex(9, 2)
    index.publish(tokens(3, 4, 5), named(0, 1, 3))
    for wanted, found in (((0, 1), [3, 4]), ((0, 1, 2, 3), [3, 4]), ((2, 0), []), ((), []), ((3,), [5])):
        match = index.match(named(*wanted))
        assert match.tolist() == found
        assert match.dtype == np.int32


def test_forgotten_names_can_be_given_again() -> None:
    index = PrefixIndex(9, 2)
    index.publish(tokens(3, 4), named(0, 1))
    index.forget(tokens(3))
    assert index.find(named(0, 1)).tolist() == [-1, 4]
    assert index.publish(tokens(8), named(0)).tolist() == [8]
    assert index.num_published() == 2


@pytest.mark.parametrize("published", [(), (3,), (3, 4, 5), (3, 5)])
def test_check_compares_with_the_published_blocks(published: tuple[int, ...]) -> None:
    index = PrefixIndex(9, 2)
    index.publish(tokens(3, 4), named(0, 1))
    index.check(tokens(3, 4))
    with pytest.raises(InternalError, match="prefix index and the published blocks differ"):
        index.check(tokens(*published))


def test_check_sees_a_name_overwritten() -> None:
    index = PrefixIndex(9, 2)
    index.publish(tokens(3, 4), named(0, 1))
    index.names[3, 0] ^= 1
    with pytest.raises(InternalError):
        index.check(tokens(3, 4))


def test_split_names() -> None:
    assert split_names(b"") == []
    assert split_names(named(*range(5))) == [name(i) for i in range(5)]
    assert len(set(itertools.chain(split_names(named(1, 2))))) == 2
