"""One atomic snapshot of what the manager holds and has done."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

BUCKETS = (*(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5)), 10.0)
"""Upper bounds of what a ``Histogram`` counts together, in seconds: 1, 2 and 5 of each power of ten, 1 µs to 10 s."""


Exemplar = tuple[dict[str, object], float, float]
"""One of the durations that a histogram counted: which it was, its seconds, and when, in seconds since the epoch."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, plain integers that the verbs add to."""

    prefix_query_tokens: int = 0
    """Prompt tokens of added sequences."""
    prefix_hit_tokens: int = 0
    """Those of them that were found in the prefix cache."""
    prefix_partial_hit_tokens: int = 0
    """Those of the hits that are the beginning of a block, which is copied."""
    prefix_host_hit_tokens: int = 0
    """Those of the hits that came up from the host tier, whole blocks."""
    prefix_collisions: int = 0
    """Blocks found by name that held other tokens; each was a miss."""
    draft_tokens: int = 0
    """Tokens of committed steps that were not accepted."""
    demoted_blocks: int = 0
    """Evicted blocks that went down to the host tier."""
    promoted_blocks: int = 0
    """Blocks that came up from the host tier because a prompt needed them."""
    cleared_blocks: int = 0
    """Cached blocks that ``clear`` forgot."""
    evicted_wanted_blocks: int = 0
    """Blocks of added prompts that the device had held and evicted."""
    duplicate_blocks: int = 0
    """Blocks that two sequences computed at once; the later one was given back."""
    cow_copies: int = 0
    steps_committed: int = 0
    steps_aborted: int = 0
    tokens_committed: int = 0
    swapped_blocks: dict[str, int] = field(default_factory=lambda: {"out": 0, "in": 0})
    """Blocks whose bytes moved, by direction."""
    swapped_sequences: dict[str, int] = field(default_factory=lambda: {"out": 0, "in": 0})
    swap_failures: dict[str, int] = field(default_factory=lambda: {"out": 0, "in": 0})
    promotion_failures: int = 0
    failures: dict[str, int] = field(
        default_factory=lambda: {
            "out_of_blocks": 0,
            "out_of_host_blocks": 0,
            "out_of_sequences": 0,
            "sequence_too_long": 0,
            "pin_quota_exceeded": 0,
        }
    )
    """Calls refused for want of room, by reason."""
    invariant_violations: int = 0
    """Must stay 0."""


@dataclass(slots=True)
class Histogram:
    """How often something took how long."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """Durations up to each of ``BUCKETS`` and above the one before; the last are those above all."""
    sum: float = 0.0
    """Seconds altogether."""
    exemplars: list[Exemplar | None] = field(default_factory=lambda: [None] * (len(BUCKETS) + 1))
    """The latest duration of each bucket."""

    def add(self, seconds: float, labels: dict[str, object], now: float) -> None:
        """Count one duration that ended ``now``, in seconds since the epoch."""
        bucket = bisect_left(BUCKETS, seconds)
        self.counts[bucket] += 1
        self.sum += seconds
        self.exemplars[bucket] = (labels, seconds, now)

    def copy(self) -> Histogram:
        """As it is now."""
        return Histogram(list(self.counts), self.sum, list(self.exemplars))


@dataclass(frozen=True, slots=True)
class TierStats:
    """Blocks of one tier by state (they sum to ``num_blocks``), and slots by what they hold."""

    name: str
    num_blocks: int
    block_size: int
    null: int
    free: int
    open: int
    full: int
    cached: int
    fenced: int
    references: int
    """Table entries and moves under way; more than ``used`` by what sharing saves."""
    pinned: int
    """Full blocks that nobody but pins holds."""
    waste_slots: int
    """Slots of open blocks that hold no token yet."""
    allocated_total: int
    released_total: int
    evicted_total: int
    sequences: int

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.open + self.full - self.pinned

    @property
    def saved(self) -> int:
        """Blocks that would be needed on top if nothing were shared."""
        return self.references - self.used

    @property
    def utilization(self) -> float:
        """Share of the blocks that can be given out which sequences hold, 0 to 1."""
        return self.used / (self.num_blocks - self.null)


@dataclass(frozen=True, slots=True)
class Stats:
    """The manager at one instant, taken under its lock."""

    tiers: tuple[TierStats, ...]
    counters: Counters
    sequences: int
    max_sequences: int
    steps_in_flight: int
    digest: str
    """Equal on ranks whose managers were called alike and decided alike."""
    timings: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)
    """What was timed, by operation and kind: see ``pagemgr.timings``. Empty for a manager without a cache."""

    @property
    def device(self) -> TierStats:
        """The first tier."""
        return self.tiers[0]

    @property
    def hit_ratio(self) -> float:
        """Prompt tokens found in the prefix cache, 0 to 1."""
        queried = self.counters.prefix_query_tokens
        return self.counters.prefix_hit_tokens / queried if queried else 0.0
