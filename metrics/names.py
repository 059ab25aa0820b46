"""Every metric there is: its name, its unit, its labels, what it means, and where it is read.

The name says the kind: ``_total`` is a counter, ``_seconds`` a histogram, ``_info`` is always 1 and its labels are the
news, anything else is a gauge. Units are base units. All but ``pagemgr_build_info`` have the label ``pool`` as well,
and no label takes a value that traffic could invent. README.md beside this file says what to do about each.
"""

from __future__ import annotations

from pagemgr.stats import TierStats

from .metric import Metric, Pool, counter, counters, elsewhere, info, one, tier_parts, tiers, timing

BUILD_INFO = "pagemgr_build_info"
UP = "pagemgr_up"

STATES = ("null", "free", "open", "full", "cached", "fenced")
DEVICE = "device"


def bytes_by_cause(tier: TierStats, block_bytes: int) -> dict[str, int]:
    """Where the bytes of a tier are; the values sum to ``tier.num_blocks * block_bytes``, exactly.

    The causes are the states of its blocks, but for those that are held. Of the device these are ``pinned`` if nobody
    but pins holds them, else ``full``, and ``open_used`` as far as the slots of open blocks hold tokens; of any other
    tier they are ``swapped``. What the open blocks of either do not hold yet is ``tail_waste``.
    """
    waste = tier.waste_slots * block_bytes // tier.block_size
    open_used, pinned = tier.open * block_bytes - waste, tier.pinned * block_bytes
    full = tier.full * block_bytes - pinned
    on_device = {"open_used": open_used, "full": full, "pinned": pinned}
    held = on_device if tier.name == DEVICE else {"swapped": open_used + full + pinned}
    rest = {state: getattr(tier, state) * block_bytes for state in ("cached", "fenced", "free", "null")}
    return {**held, "tail_waste": waste, **rest}


def _capacity(tier: TierStats, pool: Pool) -> int:
    return tier.num_blocks * pool.block_bytes


def _fragmentation(tier: TierStats, pool: Pool) -> float:
    return tier.waste_slots / (tier.used * tier.block_size) if tier.used else 0.0


_IDENTITY = (
    Metric(BUILD_INFO, "", ("version", "python", "torch"), "The versions that are running, once a process.", elsewhere),
    Metric(
        UP,
        "0 or 1",
        (),
        "1 if the pool could be read for this scrape; 0 if not, and then nothing else is reported of it.",
        elsewhere,
    ),
    Metric(
        "pagemgr_backend_info",
        "",
        ("backend", "device", "dtype"),
        "What computes attention, where, and over which element type.",
        info(lambda pool: pool.backend, lambda pool: pool.device, lambda pool: pool.dtype),
    ),
)

_CAPACITY = (
    Metric("pagemgr_pool_capacity_bytes", "bytes", ("tier",), "Size of a tier.", tiers(_capacity)),
    Metric(
        "pagemgr_pool_bytes",
        "bytes",
        ("tier", "cause"),
        "Where the bytes of a tier are; the causes sum to its capacity.",
        tier_parts(lambda tier, pool: bytes_by_cause(tier, pool.block_bytes)),
    ),
    Metric(
        "pagemgr_unaccounted_bytes",
        "bytes",
        ("tier",),
        "Capacity less the sum over all causes: must be 0.",
        tiers(lambda tier, pool: _capacity(tier, pool) - sum(bytes_by_cause(tier, pool.block_bytes).values())),
    ),
    Metric(
        "pagemgr_blocks",
        "blocks",
        ("tier", "state"),
        "Blocks by state; the states sum to the size of the tier.",
        tier_parts(lambda tier, pool: {state: getattr(tier, state) for state in STATES}),
    ),
    Metric("pagemgr_block_bytes", "bytes", (), "Size of one block.", lambda pool, stats: [((), pool.block_bytes)]),
    Metric("pagemgr_block_size_tokens", "tokens", (), "Slots of one block.", one(lambda s: s.device.block_size)),
    Metric(
        "pagemgr_pool_utilization_ratio",
        "0 to 1",
        ("tier",),
        "Share of a tier's blocks that sequences hold.",
        tiers(lambda tier, pool: tier.utilization),
    ),
    Metric(
        "pagemgr_internal_fragmentation_ratio",
        "0 to 1",
        ("tier",),
        "Share of the slots in those blocks that hold no token yet.",
        tiers(_fragmentation),
    ),
    Metric(
        "pagemgr_sharing_saved_bytes",
        "bytes",
        ("tier",),
        "What would be needed on top if nothing were shared. No part of the capacity.",
        tiers(lambda tier, pool: tier.saved * pool.block_bytes),
    ),
)

_USE = (
    Metric(
        "pagemgr_sequences",
        "sequences",
        ("tier",),
        "Live sequences by the tier they are in.",
        tiers(lambda tier, pool: tier.sequences),
    ),
    Metric(
        "pagemgr_max_sequences",
        "sequences",
        (),
        "Most sequences that can live at once.",
        one(lambda s: s.max_sequences),
    ),
    Metric(
        "pagemgr_steps_in_flight",
        "steps",
        (),
        "Steps that are reserved, and neither committed nor aborted.",
        one(lambda s: s.steps_in_flight),
    ),
    Metric("pagemgr_steps_committed_total", "steps", (), "Steps that ran.", counter(lambda c: c.steps_committed)),
    Metric(
        "pagemgr_steps_aborted_total", "steps", (), "Steps that were taken back.", counter(lambda c: c.steps_aborted)
    ),
    Metric(
        "pagemgr_tokens_committed_total",
        "tokens",
        (),
        "New tokens of the steps that ran.",
        counter(lambda c: c.tokens_committed),
    ),
    Metric(
        "pagemgr_draft_tokens_total",
        "tokens",
        (),
        "Tokens of the steps that ran which were not accepted, and rolled back.",
        counter(lambda c: c.draft_tokens),
    ),
)

_REUSE = (
    Metric(
        "pagemgr_prefix_query_tokens_total",
        "tokens",
        (),
        "Prompt tokens of added sequences.",
        counter(lambda c: c.prefix_query_tokens),
    ),
    Metric(
        "pagemgr_prefix_hit_tokens_total",
        "tokens",
        ("tier",),
        "Those of them that were found in the prefix cache, by the tier that held them.",
        counters(lambda c: {DEVICE: c.prefix_hit_tokens - c.prefix_host_hit_tokens, "host": c.prefix_host_hit_tokens}),
    ),
    Metric(
        "pagemgr_prefix_partial_hit_tokens_total",
        "tokens",
        (),
        "Those of the hits that are the beginning of a block, which is copied.",
        counter(lambda c: c.prefix_partial_hit_tokens),
    ),
    Metric(
        "pagemgr_prefix_collisions_total",
        "blocks",
        (),
        "Blocks found by name that held other tokens; each was a miss.",
        counter(lambda c: c.prefix_collisions),
    ),
    Metric(
        "pagemgr_duplicate_blocks_total",
        "blocks",
        (),
        "Blocks given back because another sequence had computed the same.",
        counter(lambda c: c.duplicate_blocks),
    ),
    Metric(
        "pagemgr_cow_copies_total",
        "blocks",
        (),
        "Blocks copied because a sequence was to write where others read.",
        counter(lambda c: c.cow_copies),
    ),
)

_PRESSURE = (
    Metric(
        "pagemgr_block_allocations_total",
        "blocks",
        ("tier",),
        "Blocks given out to be filled, evicted ones included.",
        tiers(lambda tier, pool: tier.allocated_total),
    ),
    Metric(
        "pagemgr_block_releases_total",
        "blocks",
        ("tier",),
        "Times that a block lost its last reference.",
        tiers(lambda tier, pool: tier.released_total),
    ),
    Metric(
        "pagemgr_evictions_total",
        "blocks",
        ("tier", "policy", "reason"),
        "Cached blocks that were given up; those that went down to the host are among them.",
        lambda pool, stats: [((tier.name, pool.policy, "capacity"), tier.evicted_total) for tier in stats.tiers],
    ),
    Metric(
        "pagemgr_evicted_wanted_blocks_total",
        "blocks",
        (),
        "Blocks of added prompts that the device had held and evicted not long before.",
        counter(lambda c: c.evicted_wanted_blocks),
    ),
    Metric(
        "pagemgr_cleared_blocks_total",
        "blocks",
        (),
        "Cached blocks that were forgotten on demand.",
        counter(lambda c: c.cleared_blocks),
    ),
    Metric(
        "pagemgr_allocation_failures_total",
        "calls",
        ("reason",),
        "Calls that were refused for want of room.",
        counters(lambda c: c.failures),
    ),
)

_TIERS = (
    Metric(
        "pagemgr_swap_sequences_total",
        "sequences",
        ("direction",),
        "Sequences moved to the host (out) or back to the device (in).",
        counters(lambda c: c.swapped_sequences),
    ),
    Metric(
        "pagemgr_swap_blocks_total",
        "blocks",
        ("direction",),
        "Blocks copied to move sequences.",
        counters(lambda c: c.swapped_blocks),
    ),
    Metric(
        "pagemgr_swap_bytes_total",
        "bytes",
        ("direction",),
        "Bytes copied to move sequences.",
        lambda pool, stats: [((to,), n * pool.block_bytes) for to, n in stats.counters.swapped_blocks.items()],
    ),
    Metric(
        "pagemgr_swap_failures_total",
        "moves",
        ("direction",),
        "Moves that failed or were cancelled.",
        counters(lambda c: c.swap_failures),
    ),
    Metric(
        "pagemgr_swap_seconds",
        "seconds",
        ("direction",),
        "Time to copy the blocks of one move, on the device's clock.",
        timing("swap"),
    ),
    Metric(
        "pagemgr_host_cache_blocks_total",
        "blocks",
        ("direction",),
        "Evicted blocks that went down to the host (out), and cached ones that came up for a prompt (in).",
        counters(lambda c: {"out": c.demoted_blocks, "in": c.promoted_blocks}),
    ),
    Metric(
        "pagemgr_host_cache_failures_total",
        "moves",
        (),
        "Times that blocks could not come up; their tokens were computed instead.",
        counter(lambda c: c.promotion_failures),
    ),
    Metric(
        "pagemgr_host_cache_seconds",
        "seconds",
        ("direction",),
        "Time to copy the blocks of one move of the host cache, on the device's clock, of one in 13.",
        timing("host_cache"),
    ),
)

_KERNELS = (
    Metric(
        "pagemgr_step_seconds",
        "seconds",
        ("phase",),
        "Time from reserve to commit, on the device's clock, of one step in 13.",
        timing("step"),
    ),
    Metric(
        "pagemgr_kernel_seconds",
        "seconds",
        ("op",),
        "Time of one backend call, on the device's clock: of one layer of these steps, and of one copy in 13.",
        timing("kernel"),
    ),
)

_HEALTH = (
    Metric(
        "pagemgr_invariant_violations_total",
        "checks",
        (),
        "Checks of the pool that failed: must stay 0.",
        counter(lambda c: c.invariant_violations),
    ),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for group in (_IDENTITY, _CAPACITY, _USE, _REUSE, _PRESSURE, _TIERS, _KERNELS, _HEALTH)
    for metric in group
}
"""Name → metric, in the order in which they are reported."""
