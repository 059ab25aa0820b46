"""Blocks and their reference counts, for one tier.

Rule 1: only this file changes a reference count. Rule 2: it knows nothing of sequences, hashes or tensors.

States, each defined by what holds the block and what moves it out:

    null     block 0: pads tables, is never given out.
    free     nobody's, and its content is worthless. ``take`` moves it to open.
    open     referenced and being filled. ``seal`` moves it to full, the last ``release`` to free (or fenced).
    full     referenced and immutable: published under a hash. The last ``release`` moves it to cached (or fenced).
    cached   published, unreferenced. ``acquire`` (a prefix hit) moves it to full, ``take`` (an eviction) to open.
    fenced   unreferenced, but something in flight may still use it. When its last fence has passed it becomes cached
             if it is published, else free; ``acquire`` moves it back to full or open meanwhile.

Conservation, asserted by ``check``: null + free + open + full + cached + fenced == num_blocks, and a block has
references exactly when it is open or full.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import InternalError, InvalidInput, OutOfBlocks
from .eviction import Blocks, EvictionPolicy
from .layout import NULL_BLOCK
from .watch import CHECKS, POISON, Watch

_NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int32)


class BlockState(IntEnum):
    """See the module's docstring."""

    null = 0
    free = 1
    open = 2
    full = 3
    cached = 4
    fenced = 5


_STATES = len(BlockState)
NULL, FREE, OPEN, FULL, CACHED, FENCED = map(int, BlockState)  # numpy compares plain integers faster
MOST_REFERENCES = 2**31 - 1
"""Of one block: they are counted in int32."""
Ints = npt.NDArray[np.int64]


class Fence(Protocol):
    """Something that passes once and stays passed, such as a recorded ``torch.cuda.Event``."""

    def query(self) -> bool:
        """True once everything the fence stands for is done."""


class BlockPool:
    """The blocks of one tier. Every method takes an array of distinct block ids (int32) and is all or nothing."""

    def __init__(self, num_blocks: int, policy: EvictionPolicy, tier: str = "device", debug: int = CHECKS) -> None:
        if num_blocks < 2:
            raise InvalidInput(f"a tier needs at least 2 blocks (one is the null block), got {num_blocks}")
        self.num_blocks = num_blocks
        self.tier = tier
        self.policy = policy
        self.watch = Watch(debug) if debug >= POISON else None
        self._checked = debug >= CHECKS
        self.refs = np.zeros(num_blocks, dtype=np.int32)
        self.state = np.full(num_blocks, FREE, dtype=np.uint8)
        self.state[NULL_BLOCK] = NULL
        self.published = np.zeros(num_blocks, dtype=np.bool_)
        self.pending = np.zeros(num_blocks, dtype=np.int32)  # fences that each block still waits for
        self.counts = [0] * len(BlockState)
        self.counts[NULL] = 1
        self.counts[FREE] = num_blocks - 1
        # A stack of blanks: the last released is the first reused, while its cache lines are warm.
        self.stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._fences: list[tuple[tuple[Fence, ...], Blocks]] = []
        self.num_allocated = 0
        self.num_released = 0
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Blanks on the stack."""
        return self.counts[FREE]

    @property
    def available(self) -> int:
        """Blocks that ``peek`` can give: free plus cached."""
        return self.counts[FREE] + self.counts[CACHED]

    def peek(self, count: int, sparing: Blocks = _NO_BLOCKS) -> Blocks:
        """The next ``count`` blocks that ``take`` would give: blanks first, then the policy's victims. Pure.

        Cached blocks in ``sparing`` are passed over: the caller is about to acquire them. Raises ``OutOfBlocks``.
        """
        spared = sparing[self.state[sparing] == CACHED]
        if count + len(spared) > self.available:
            fenced = self.counts[FENCED]
            raise OutOfBlocks(count, self.available - len(spared), fenced, self.tier)
        free = self.counts[FREE]
        blanks = self.stack[max(free - count, 0) : free][::-1]
        if len(blanks) == count:
            return blanks.copy()
        victims = self.policy.victims(count - len(blanks) + len(spared))
        if len(spared):
            victims = victims[~np.isin(victims, spared)][: count - len(blanks)]
        if len(victims) != count - len(blanks) or (self.state[victims] != CACHED).any():
            raise InternalError(f"{type(self.policy).__name__} offered blocks that cannot be evicted")
        return np.concatenate([blanks, victims])

    def take(self, blocks: Blocks) -> Blocks:
        """Give out what ``peek`` just returned: open, one reference each. Returns those that were evicted."""
        blanks = min(len(blocks), self.counts[FREE])
        evicted = blocks[blanks:]
        self.counts[FREE] -= blanks
        self.counts[CACHED] -= len(evicted)
        self.counts[OPEN] += len(blocks)
        if len(evicted):
            self.policy.evict(evicted)
            self.published[evicted] = False
        self.refs[blocks] = 1
        self.state[blocks] = OPEN
        self.num_allocated += len(blocks)
        self.num_evicted += len(evicted)
        if self.watch is not None:
            self.watch.taken(blocks)
            self.watch.note(blocks, "given out")
        return evicted

    def acquire(self, blocks: Blocks, times: Ints | int = 1) -> None:
        """Add references to distinct blocks, ``times`` to each. Refuses blocks that hold nothing."""
        states = self.state[blocks]
        if self._checked and (states <= FREE).any():
            nothing = blocks[states <= FREE][:8].tolist()
            raise InternalError(f"reference to {self.tier} blocks that hold nothing: {nothing}{self._past(nothing)}")
        held = (self.refs[blocks] + times).astype(np.int32)
        if self._checked and len(blocks) and held.min() < 1:  # past int32 it wraps
            raise InternalError(f"more than {MOST_REFERENCES} references to {self.tier} blocks {blocks[held < 1][:8]}")
        if self.watch is not None:
            self.watch.note(blocks, "shared")
        idle = states >= CACHED
        if idle.any():
            self.policy.hit(blocks[states == CACHED])
            back = np.where(self.published[blocks[idle]], FULL, OPEN)
            self._recount(blocks[idle], states[idle], back)
        self.refs[blocks] = held

    def release(self, blocks: Blocks, times: Ints | int = 1, fences: tuple[Fence, ...] = ()) -> None:
        """Drop references to distinct blocks, ``times`` of each.

        Blocks left without references become cached or free in this order, once ``fences`` have passed. Dropping a
        reference that does not exist is refused before anything changes.
        """
        left = self.refs[blocks] - times
        if self._checked and len(blocks) and left.min() < 0:
            twice = blocks[left < 0][:8].tolist()
            raise InternalError(f"double free of {self.tier} blocks {twice}{self._past(twice)}")
        self.refs[blocks] = left
        if self.watch is not None:
            self.watch.note(blocks, "released")
        if fences:
            self.pending[blocks] += 1
            self._fences.append((fences, blocks))
        idle = blocks[left == 0]
        self.num_released += len(idle)
        waits = self.pending[idle] > 0
        if waits.any():
            self._recount(idle[waits], self.state[idle[waits]], FENCED)
            idle = idle[~waits]
        self._settle(idle)

    def count_taken(self, blanks: int) -> None:
        """The compiled loops took this many blanks off the stack and opened them."""
        self.counts[FREE] -= blanks
        self.counts[OPEN] += blanks
        self.num_allocated += blanks
        if self.watch is not None:
            self.watch.taken(self.stack[self.counts[FREE] :][:blanks])

    def count_sealed(self, blocks: int) -> None:
        """The compiled loops made this many open blocks full."""
        self.counts[OPEN] -= blocks
        self.counts[FULL] += blocks

    def count_released(self, blanks: int, cached: Blocks) -> None:
        """The compiled loops pushed this many open blocks on the stack, and these full ones became cached."""
        self.counts[OPEN] -= blanks
        self.counts[FREE] += blanks
        self.counts[FULL] -= len(cached)
        self.counts[CACHED] += len(cached)
        self.num_released += blanks + len(cached)
        self.policy.insert(cached)
        if self.watch is not None:
            self.watch.freed(self.stack[self.counts[FREE] - blanks : self.counts[FREE]])

    @property
    def has_fences(self) -> bool:
        """Whether any block waits for a fence."""
        return bool(self._fences)

    def seal(self, blocks: Blocks) -> None:
        """Open blocks become full: immutable, published under a hash."""
        if self._checked and (self.state[blocks] != OPEN).any():
            raise InternalError(f"only open blocks can be sealed, not {blocks[:8].tolist()}")
        self.published[blocks] = True
        self.state[blocks] = FULL
        self.count_sealed(len(blocks))

    def retract(self, blocks: Blocks) -> None:
        """Published blocks no longer are: full ones become open, cached ones free, and fenced ones will be free."""
        states = self.state[blocks]
        full, cached = blocks[states == FULL], blocks[states == CACHED]
        self.published[blocks] = False
        self.count_sealed(-len(full))
        self.state[full] = OPEN
        self.policy.evict(cached)
        self._settle(cached)

    def poll(self) -> None:
        """Let go of the blocks whose fences have passed. If a fence raises, nothing has changed."""
        if not self._fences:
            return
        passed = [all(fence.query() for fence in fences) for fences, _ in self._fences]
        batches = self._fences
        self._fences = [batch for batch, done in zip(batches, passed, strict=True) if not done]
        for (_, blocks), done in zip(batches, passed, strict=True):
            if done:
                self.pending[blocks] -= 1
                self._settle(blocks[(self.pending[blocks] == 0) & (self.state[blocks] == FENCED)])

    def writable(self, blocks: Blocks) -> npt.NDArray[np.bool_]:
        """Which of these their one owner may write in place: nobody else holds or may still read them."""
        return np.asarray((self.state[blocks] == OPEN) & (self.refs[blocks] == 1) & (self.pending[blocks] == 0))

    def check(self, references: npt.NDArray[np.int64]) -> None:
        """Raise ``InternalError`` unless every invariant holds; ``references[b]`` counts the table entries naming b."""
        states = self.state
        counted = np.bincount(states, minlength=len(BlockState)).tolist()
        owned = (states == OPEN) | (states == FULL)
        free = np.sort(self.stack[: self.counts[FREE]])
        cached = self.policy.victims(self.counts[CACHED])
        fenced = [blocks for _, blocks in self._fences]
        pending = np.bincount(np.concatenate(fenced), minlength=self.num_blocks) if fenced else np.zeros_like(states)
        laws: Sequence[tuple[str, bool]] = (
            ("counts by state", counted == self.counts),
            ("conservation", sum(self.counts) == self.num_blocks),
            ("the null block is nobody's", states[NULL_BLOCK] == NULL and counted[NULL] == 1),
            ("references equal table entries", bool((self.refs == references).all())),
            ("references exactly in open and full", bool(((self.refs > 0) == owned).all())),
            ("the free stack holds the free blocks", np.array_equal(free, np.flatnonzero(states == FREE))),
            (
                "the policy holds the cached blocks",
                np.array_equal(np.sort(cached), np.flatnonzero(states == CACHED)),
            ),
            (
                "full and cached are published",
                bool(self.published[(states == FULL) | (states == CACHED)].all()),
            ),
            (
                "free and open are not",
                not self.published[(states == FREE) | (states == OPEN)].any(),
            ),
            ("pending counts fences", bool((pending == self.pending).all())),
            ("fenced blocks wait for a fence", bool((self.pending[states == FENCED] > 0).all())),
        )
        for law, holds in laws:
            if not holds:
                raise InternalError(f"{self.tier} pool: broken invariant: {law}")

    def _past(self, blocks: list[int]) -> str:
        return self.watch.tell(blocks) if self.watch is not None else ""

    def _settle(self, idle: Blocks) -> None:
        """Unreferenced, unfenced blocks become cached or free, in order."""
        published = self.published[idle]
        if published.any():
            cached = idle[published]
            self._recount(cached, self.state[cached], CACHED)
            self.policy.insert(cached)
            idle = idle[~published]
        if len(idle):
            start = self.counts[FREE]
            self._recount(idle, self.state[idle], FREE)
            self.stack[start : start + len(idle)] = idle
            if self.watch is not None:
                self.watch.freed(idle)
                if self.watch.quarantine:  # to the bottom: reused after everything that is blank now
                    self.stack[: start + len(idle)] = np.roll(self.stack[: start + len(idle)], len(idle))

    def _recount(self, blocks: Blocks, old: npt.NDArray[np.uint8], new: int | npt.NDArray[np.int64]) -> None:
        """Set states and keep the counts true."""
        self.state[blocks] = new
        gone = np.bincount(old, minlength=_STATES).tolist()
        come = [0] * _STATES
        if isinstance(new, int):
            come[new] = len(blocks)
        else:
            come = np.bincount(new, minlength=_STATES).tolist()
        self.counts = [count - out + into for count, out, into in zip(self.counts, gone, come, strict=True)]


def tally(blocks: Blocks) -> tuple[Blocks, Ints]:
    """The distinct blocks of a list, ordered by where each is named last, and how often each is named."""
    if len(blocks) == 1:
        return blocks, np.ones(1, dtype=np.int64)
    distinct, from_end, mentions = np.unique(blocks[::-1], return_index=True, return_counts=True)
    order = np.argsort(-from_end)
    return distinct[order], mentions[order]
