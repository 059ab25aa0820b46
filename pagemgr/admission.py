"""What a new sequence starts with: the longest beginning of its prompt that is still there in every layer group.

A group of full attention needs every block from the start. A group with a window needs only those that the next token
sees; what it holds besides is of no use, and a hit in one group is none where another cannot follow.

After the last whole block, the leading tokens of one more are reused if some published block begins alike: the sequence
starts inside that block, and copy-on-write gives it a copy of its own before it writes there. As it holds both until
then, that is done only where the rest of the prompt has room beside them: a prompt that fits fits with any hit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .eviction import Blocks
from .ids import TokenArray
from .pool import BlockState
from .prefix import DIGEST_BYTES, group_roots
from .sequences import Prompt, Sequence, SequenceTable
from .tier import Tier

_NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt with the names of its full blocks in each layer group, so that no token is hashed twice."""

    tokens: TokenArray
    roots: tuple[bytes, ...]
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """``length`` tokens, and by group the blocks that hold them, which follow ``dropped`` columns."""

    length: int
    dropped: tuple[int, ...]
    blocks: tuple[Blocks, ...]
    """Of the device, -1 where it has none."""
    below: tuple[Blocks, ...]
    """Of the host where the device has none, else -1."""
    collisions: int = 0
    """Blocks whose name was right and whose tokens were not."""

    @property
    def columns_below(self) -> int:
        """Blocks of the prompt for which some group depends on the host."""
        return max(int(np.count_nonzero(blocks >= 0)) for blocks in self.below)

    def arrived(self, fresh: dict[int, int]) -> Match:
        """The same once the blocks of the host are in these of the device."""
        blocks = tuple(
            np.array([fresh[low] if low >= 0 else high for high, low in zip(device, host, strict=True)], dtype=np.int32)
            for device, host in zip(self.blocks, self.below, strict=True)
        )
        nothing = tuple(np.full_like(each, -1) for each in blocks)
        return Match(self.length, self.dropped, blocks, nothing, self.collisions)


def blocks_below(matches: list[Match]) -> Blocks:
    """The blocks of the host that these matches need, each once, in the order of the prompts."""
    entries = np.concatenate([blocks for match in matches for blocks in match.below] or [_NO_BLOCKS])
    distinct, first = np.unique(entries[entries >= 0], return_index=True)
    return distinct[np.argsort(first)]


def arrive(tokens: TokenArray, root: bytes, tier: Tier, num_groups: int, named: bool) -> Arrival:
    """Hash a prompt; without prefix caching (not ``named``) there is nothing to hash for."""
    roots = tuple(group_roots(root, num_groups))
    names = tuple(tier.index.hash(each, tokens) for each in roots) if named else (b"",) * num_groups
    return Arrival(tokens, roots, names)


def find_whole(arrival: Arrival, tiers: tuple[Tier, ...], windows: tuple[int | None, ...], verify: bool) -> Match:
    """The longest usable run of whole blocks in these tiers, the first being the device. Pure.

    One token at least is left to run. ``verify`` compares token ids and not names alone.
    """
    size = tiers[0].index.block_size
    usable, collisions = max(len(arrival.tokens) - 1, 0) // size, 0
    found: list[tuple[Blocks, Blocks]] = []
    for window, names in zip(windows, arrival.names, strict=True):
        held = _held(tiers, names[: usable * DIGEST_BYTES], window is None)
        if verify:
            collisions += sum(
                _drop_collisions(tier, blocks, arrival) for tier, blocks in zip(tiers, held, strict=False)
            )
        nowhere = (held[0] < 0) & (held[1] < 0)
        if window is None:
            missing = np.flatnonzero(nowhere)
            usable = int(missing[0]) if len(missing) else len(nowhere)
        found.append(held)
    needed = [usable if window is None else -(-(window - 1) // size) for window in windows]
    if any(window is not None for window in windows):
        serves = [_serves(up[:usable], low[:usable], need) for (up, low), need in zip(found, needed, strict=True)]
        usable = int(np.flatnonzero(np.logical_and.reduce(serves))[-1])
    first = tuple(max(usable - need, 0) for need in needed)
    blocks = tuple(up[start:usable] for (up, _), start in zip(found, first, strict=True))
    below = tuple(low[start:usable] for (_, low), start in zip(found, first, strict=True))
    return Match(usable * size, first, blocks, below, collisions)


def _held(tiers: tuple[Tier, ...], names: bytes, leading: bool) -> tuple[Blocks, Blocks]:
    """Blocks of the device and of the host by these names, -1 where there is none; ``leading`` may stop at a gap."""
    if len(tiers) == 1:
        up = tiers[0].index.match(names) if leading else tiers[0].index.find(names)
        return up, np.full_like(up, -1)
    up, low = (tier.index.find(names) for tier in tiers)
    low[up >= 0] = -1
    return up, low


def _drop_collisions(tier: Tier, blocks: Blocks, arrival: Arrival) -> int:
    """Take out the blocks that hold other tokens than their name says; returns how many."""
    size = tier.index.block_size
    expected = arrival.tokens[: len(blocks) * size].reshape(-1, size)
    wrong = (blocks >= 0) & (tier.index.tokens[blocks] != expected).any(axis=1)
    blocks[wrong] = -1
    return int(np.count_nonzero(wrong))


def admit(
    match: Match, arrival: Arrival, device: Tier, table: SequenceTable, keep_prompt: bool, shared: bool = False
) -> Sequence:
    """Make the sequence of a match that the device serves alone.

    ``keep_prompt`` saves hashing what was hashed here, at the price of comparing it later; ``shared`` says that the
    references are counted already.
    """
    rows = table.create(arrival.roots[0])
    if not shared:
        device.share(np.concatenate(match.blocks) if len(rows) > 1 else match.blocks[0])
    for row, dropped, blocks, names in zip(rows.tolist(), match.dropped, match.blocks, arrival.names, strict=True):
        table.blocks[row, dropped : dropped + len(blocks)] = blocks
        table.num_blocks[row] = dropped + len(blocks)
        table.dropped[row] = dropped
        if dropped:
            table.roots[row] = np.frombuffer(names, np.uint8, DIGEST_BYTES, (dropped - 1) * DIGEST_BYTES)
        if keep_prompt and len(names) > match.length // device.index.block_size * DIGEST_BYTES:
            table.prompts[row] = Prompt(arrival.tokens, names)
    table.reserved[rows] = table.computed[rows] = table.committed[rows] = match.length
    return table.handle(int(rows[0]), match.length)


def _serves(up: Blocks, low: Blocks, needed: int) -> npt.NDArray[np.bool_]:
    """Whether a group can go on after the first 0, 1, 2, … blocks: the last ``needed`` of them are somewhere."""
    count = np.arange(1, len(up) + 1)
    run = count - np.maximum.accumulate(np.where((up < 0) & (low < 0), count, 0))
    return np.concatenate([[True], run >= np.minimum(count, needed)])


def with_tail(match: Match, arrival: Arrival, tier: Tier) -> Match:
    """The match, longer by what one more block of each group has in common with the prompt."""
    size = tier.index.block_size
    whole = match.length // size
    rest = arrival.tokens[match.length : min(match.length + size, len(arrival.tokens) - 1)]
    if not len(rest) or not arrival.names[0]:
        return match
    tails: list[int] = []
    common = len(rest)
    for root, names in zip(arrival.roots, arrival.names, strict=True):
        parent = names[(whole - 1) * DIGEST_BYTES : whole * DIGEST_BYTES] if whole else root
        block, alike = tier.tail(parent, rest)
        common = min(common, alike)
        tails.append(block)
    if not common or not _has_room(match, np.array(tails, dtype=np.int32), arrival, tier):
        return match
    longer = tuple(np.append(blocks, np.int32(tail)) for blocks, tail in zip(match.blocks, tails, strict=True))
    below = tuple(np.append(blocks, np.int32(-1)) for blocks in match.below)
    return Match(match.length + common, match.dropped, longer, below, match.collisions)


def _has_room(match: Match, tails: Blocks, arrival: Arrival, tier: Tier) -> bool:
    """Whether all that is missing of a prompt, the copies of ``tails`` included, fits beside what it holds."""
    size, pool = tier.index.block_size, tier.pool
    missing = (-(-len(arrival.tokens) // size) - match.length // size) * len(tails)
    missing += sum(int(np.count_nonzero(below >= 0)) for below in match.below)
    held = np.concatenate([*match.blocks, tails])
    if missing + len(held) <= pool.available:
        return True
    return missing + int(np.count_nonzero(pool.state[held[held >= 0]] == BlockState.cached)) <= pool.available
