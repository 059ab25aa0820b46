"""The parts of one manager, put together and read: what the verbs in ``manager.py`` work on and have in common."""

from __future__ import annotations

import threading
from collections.abc import Sequence as SequenceOf
from functools import partial

import numpy as np

from . import accelerator, checks
from .admission import Arrival, Match, arrive, find_whole, with_tail
from .checks import Held
from .errors import InvalidInput, OutOfBlocks, SequenceTooLong
from .events import EventLog, Subscription
from .eviction import Blocks
from .ids import Tokens, pack_tokens
from .native.build import DEFAULT_CACHE_DIR
from .ownership import OneProcess
from .pins import Pins
from .plan import Ints, Plan, Promotion, Transfer
from .pool import BlockState, Fence
from .preemption import Preemption, plan_preemption
from .prefix import DIGEST_BYTES, Namespace, PrefixIndex
from .second_level import SecondLevel
from .sequences import Sequence, SequenceTable
from .stats import Counters, Stats
from .steps import StepFence
from .tier import Tier
from .verb import Verb
from .watch import CHECKS, HISTORY

DEVICE, HOST = 0, 1
MOST_GROUPS = 256
"""A block's group is one byte (``PrefixIndex.groups``)."""
HOST_CACHES = ("off", "inclusive", "exclusive")

_NO_ROWS: Ints = np.zeros(0, dtype=np.int64)
_NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int32)


class Assembly(OneProcess):
    """See ``BlockManager``."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_sequences: int = 256,
        max_seq_len: int | None = None,
        num_host_blocks: int = 0,
        host_cache: str = "off",
        windows: tuple[int | None, ...] = (None,),
        rollback: int = 64,
        watermark: int = 0,
        pin_quota: int = 0,
        prefix_caching: bool = True,
        partial_hits: bool = True,
        verify_hits: bool = False,
        secret: bytes = b"",
        eviction: str = "lru",
        debug: int = CHECKS,
        compiled: bool = True,
        cache_dir: str = DEFAULT_CACHE_DIR,
    ) -> None:
        _require_sizes(num_blocks, block_size, max_sequences, num_host_blocks)
        _require_choices(host_cache, num_host_blocks, windows, debug, secret)
        _require_counts(rollback=rollback, watermark=watermark, pin_quota=pin_quota)
        most = (num_blocks - 1) * block_size
        self.max_seq_len = most if max_seq_len is None else max_seq_len
        if not 1 <= self.max_seq_len <= most:
            raise InvalidInput(
                f"max_seq_len={max_seq_len} is not in [1, {most}], what {num_blocks - 1} blocks can hold"
            )
        self.block_size, self.rollback, self.watermark = block_size, rollback, watermark
        self.prefix_caching, self.partial_hits, self.verify_hits = prefix_caching, partial_hits, verify_hits
        self._secret = secret
        sizes = {"device": num_blocks} | ({"host": num_host_blocks} if num_host_blocks else {})
        library = accelerator.load(cache_dir) if compiled and debug < HISTORY else None
        self.events = EventLog()
        make_index = partial(accelerator.NativeIndex, library=library) if library else PrefixIndex
        self.tiers = tuple(
            Tier(name, size, eviction, make_index(size, block_size), self.events, debug) for name, size in sizes.items()
        )
        cached = host_cache != "off"
        self.second = SecondLevel(self.tiers[DEVICE], self.tiers[HOST], host_cache == "exclusive") if cached else None
        self.table = SequenceTable(max_sequences, -(-self.max_seq_len // block_size), tuple(sizes), windows)
        self._accelerator = (
            accelerator.Accelerator(library, self.table, self.tiers[DEVICE], self.max_seq_len) if library else None
        )
        self.pins = Pins(pin_quota)
        self.counters = Counters()
        self._in_flight: dict[int, Plan] = {}
        self._moving: list[Transfer | Promotion] = []
        self._next_step = 1
        self._lock = threading.RLock()
        self._verb = Verb(self._lock, self.tiers, self.counters)

    # Looking --------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """One consistent snapshot."""
        with self._verb:
            transfers = [moving for moving in self._moving if isinstance(moving, Transfer)]
            held, in_flight = self._held(), len(self._in_flight)
            return checks.snapshot(self.tiers, self.table, transfers, held, self.pins, self.counters, in_flight)

    def subscribe(self, limit: int = 100_000) -> Subscription:
        """Listen to what can be found where, from now on; ``limit`` events may wait to be read."""
        with self._lock:
            now = tuple(event for tier in self.tiers for event in tier.snapshot())
            return self.events.subscribe(now, limit)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop listening."""
        with self._lock:
            self.events.unsubscribe(subscription)

    def check(self) -> None:
        """Assert every invariant in O(pool + tokens). Raises ``InternalError`` and counts the violation."""
        with self._lock:
            arriving = [moving.rows for moving in self._moving if isinstance(moving, Promotion)]
            try:
                checks.check(self.tiers, self.table, self._held(), np.concatenate([*arriving, _NO_ROWS]))
            except Exception:
                self.counters.invariant_violations += 1
                raise

    def lengths(self, sequences: SequenceOf[Sequence]) -> Ints:
        """Computed tokens of each sequence, int64."""
        with self._lock:
            return self.table.computed[self.table.rows(sequences)[: len(sequences)]]

    def match(self, prompt: Tokens, namespace: Namespace | None = None) -> tuple[int, int]:
        """Tokens of a prompt that ``add`` would find, and that ``admit`` would. Changes nothing."""
        (arrival,) = self._arrivals([prompt], [namespace])
        with self._lock:
            device = self._find(arrival, self.tiers[:1]).length
            return device, self._find(arrival, self.tiers).length if self.second is not None else device

    def preemption(
        self, sequences: SequenceOf[Sequence], counts: SequenceOf[int], candidates: SequenceOf[Sequence]
    ) -> Preemption:
        """Which of ``candidates``, taken in this order, would have to go for ``counts`` more tokens to fit.

        Changes nothing. Raises ``StaleSequence``, ``InvalidInput``.
        """
        with self._verb:
            rows = self.table.rows(sequences)
            new = self.table.spread(pack_tokens(counts).astype(np.int64))
            if len(new) != len(rows):
                raise InvalidInput(f"{len(sequences)} sequences but {len(counts)} counts")
            device = self.tiers[DEVICE]
            needed = -(-(self.table.reserved[rows] + new) // self.block_size) - self.table.num_blocks[rows]
            tails = np.count_nonzero(self.table.reserved[rows] % self.block_size)  # each may have to be copied
            shortage = int(needed.sum() + tails) - device.pool.available
            host = self.tiers[HOST] if len(self.tiers) > HOST else None
            return plan_preemption(shortage, list(candidates), device, host, self.table)

    # Prompts --------------------------------------------------------------------------------------------------------

    def _arrivals(self, prompts: SequenceOf[Tokens], namespaces: SequenceOf[Namespace | None] | None) -> list[Arrival]:
        packed = [pack_tokens(prompt) for prompt in prompts]
        spaces = [space or Namespace() for space in ([None] * len(packed) if namespaces is None else namespaces)]
        if len(spaces) != len(packed):
            raise InvalidInput(f"{len(packed)} prompts but {len(spaces)} namespaces")
        device, groups = self.tiers[DEVICE], len(self.table.windows)
        return [
            arrive(ids, space.root(self.block_size, self._secret), device, groups, self.prefix_caching)
            for space, ids in zip(spaces, packed, strict=True)
        ]

    def _find(self, arrival: Arrival, tiers: tuple[Tier, ...]) -> Match:
        whole = find_whole(arrival, tiers, self.table.windows, self.verify_hits)
        return with_tail(whole, arrival, self.tiers[DEVICE]) if self.partial_hits else whole

    def _require_admissible(self, arrivals: list[Arrival], matches: list[Match]) -> None:
        """Raise unless there are rows, and room for these prompts above the watermark."""
        longest = max((len(arrival.tokens) for arrival in arrivals), default=0)
        if longest > self.max_seq_len:
            raise SequenceTooLong(longest, self.max_seq_len)
        self.table.require(len(arrivals))
        if self.watermark:
            pool = self.tiers[DEVICE].pool
            whole = sum(-(-len(arrival.tokens) // self.block_size) for arrival in arrivals) * len(self.table.windows)
            held = np.concatenate([blocks for match in matches for blocks in match.blocks] or [_NO_BLOCKS])
            held = held[held >= 0]
            taken = int(np.count_nonzero(pool.state[np.unique(held)] == BlockState.cached))
            room = pool.available - taken - self.watermark
            if whole - len(held) > room:
                raise OutOfBlocks(whole - len(held), max(room, 0), pool.counts[BlockState.fenced], "device")

    def _count_hits(self, arrivals: list[Arrival], matches: list[Match]) -> None:
        for arrival, match in zip(arrivals, matches, strict=True):
            self.counters.prefix_query_tokens += len(arrival.tokens)
            self.counters.prefix_hit_tokens += match.length
            self.counters.prefix_partial_hit_tokens += match.length % self.block_size
            self.counters.prefix_host_hit_tokens += match.columns_below * self.block_size
            self.counters.prefix_collisions += match.collisions
            if self.tiers[DEVICE].pool.num_evicted:
                missed = match.dropped[0] + int(np.count_nonzero(match.blocks[0] >= 0))
                self.counters.evicted_wanted_blocks += self.tiers[DEVICE].wanted_again(
                    arrival.names[0][missed * DIGEST_BYTES :]
                )

    # Fences and references ------------------------------------------------------------------------------------------

    def _oldest_in_flight(self) -> int:
        return next(iter(self._in_flight), self._next_step)

    def _fences(self, after: Fence | None) -> tuple[Fence, ...]:
        if after is not None and not callable(getattr(after, "query", None)):
            raise InvalidInput(f"a fence needs a query() method, such as torch.cuda.Event has, got {after!r:.80}")
        fences: tuple[Fence, ...] = () if after is None else (after,)
        return fences + tuple(StepFence(step, self._in_flight) for step in self._in_flight)

    def _release(self, rows: Ints, keep: Ints, fences: tuple[Fence, ...]) -> None:
        for index, tier in enumerate(self.tiers):
            here = self.table.tier[rows] == index
            if here.any():
                tier.pool.release(*self.table.leaf_first(rows[here], keep[here]), fences)

    def _held(self) -> Held:
        """By tier: the blocks that transfers, steps and pins hold besides the rows, once for each reference."""
        held: dict[str, list[Blocks]] = {tier.name: [_NO_BLOCKS] for tier in self.tiers}
        held["device"].append(self.pins.blocks())
        for moving in self._moving:
            if isinstance(moving, Transfer):
                held[moving.target] += moving.moved
            else:
                held["host"].append(moving.blocks)
        for one in (*self._moving, *self._in_flight.values()):
            if one.demotion is not None:
                held["host"].append(one.demotion.blocks)
        return {name: np.concatenate(blocks) for name, blocks in held.items()}


def _require_sizes(num_blocks: int, block_size: int, max_sequences: int, num_host_blocks: int) -> None:
    if block_size < 1 or max_sequences < 1:
        raise InvalidInput(f"block_size={block_size} and max_sequences={max_sequences} must be at least 1")
    if num_blocks < 2 or not (num_host_blocks == 0 or num_host_blocks >= 2):
        raise InvalidInput(f"{num_blocks=} must be at least 2, one being the null block, {num_host_blocks=} 0 or so")


def _require_choices(
    host_cache: str, num_host_blocks: int, windows: tuple[int | None, ...], debug: int, secret: bytes
) -> None:
    if debug not in range(HISTORY + 1):
        raise InvalidInput(f"debug must be from 0 to {HISTORY}, got {debug}")
    if secret and not 16 <= len(secret) <= 64:
        raise InvalidInput(f"secret must have from 16 to 64 bytes or none, got {len(secret)}")
    if host_cache not in HOST_CACHES:
        raise InvalidInput(f"host_cache must be one of {', '.join(HOST_CACHES)}, got {host_cache!r}")
    if host_cache != "off" and not num_host_blocks:
        raise InvalidInput(f"host_cache={host_cache!r} needs host blocks, and there are none")
    if not windows or any(window is not None and window < 1 for window in windows):
        raise InvalidInput(f"windows must name at least one group, each None or at least 1 token, got {windows}")
    if len(windows) > MOST_GROUPS:
        raise InvalidInput(f"windows names {len(windows)} layer groups, at most {MOST_GROUPS} can be told apart")


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise InvalidInput(f"{name} must not be negative, got {value}")
