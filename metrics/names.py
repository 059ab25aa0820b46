"""Every metric there is: its name, its labels, and what it means.

The name says the kind: ``_total`` is a counter, ``_info`` is always 1 and its labels are the news, anything else is a
gauge. Units are base units: bytes, tokens, and ratios from 0 to 1. All but ``pagemgr_build_info`` have the label
``pool`` as well, and no label takes a value that traffic could invent.
"""

from __future__ import annotations

BUILD_INFO = "pagemgr_build_info"
UP = "pagemgr_up"

METRICS: dict[str, tuple[tuple[str, ...], str]] = {
    BUILD_INFO: (("version",), "The version that is running."),
    UP: ((), "1 if the pool could be read for this scrape; 0 if not, and then nothing else is reported of it."),
    "pagemgr_backend_info": (("backend",), "What computes attention."),
    # Where the memory is
    "pagemgr_pool_capacity_bytes": (("tier",), "Bytes of a tier."),
    "pagemgr_pool_bytes": (("tier", "cause"), "Bytes of a tier by cause; they sum to its capacity."),
    "pagemgr_blocks": (("tier", "state"), "Blocks of a tier by state; they sum to its size."),
    "pagemgr_pool_utilization_ratio": (("tier",), "Share of a tier's blocks that sequences hold."),
    "pagemgr_internal_fragmentation_ratio": (("tier",), "Share of the slots in those blocks that hold no token yet."),
    "pagemgr_sharing_saved_bytes": (("tier",), "Bytes that would be needed on top if nothing were shared."),
    # Who uses it
    "pagemgr_sequences": (("tier",), "Live sequences by the tier they are in."),
    "pagemgr_max_sequences": ((), "Most sequences that can live at once."),
    "pagemgr_steps_in_flight": ((), "Steps that are reserved, and neither committed nor aborted."),
    "pagemgr_steps_committed_total": ((), "Steps that ran."),
    "pagemgr_steps_aborted_total": ((), "Steps that were taken back."),
    "pagemgr_tokens_committed_total": ((), "New tokens of the steps that ran."),
    # Reuse
    "pagemgr_prefix_query_tokens_total": ((), "Prompt tokens of added sequences."),
    "pagemgr_prefix_hit_tokens_total": ((), "Prompt tokens of added sequences that were found in the prefix cache."),
    "pagemgr_duplicate_blocks_total": ((), "Blocks given back because another sequence had computed the same."),
    "pagemgr_cow_copies_total": ((), "Blocks copied because a sequence was to write where others read."),
    # Pressure
    "pagemgr_block_allocations_total": (("tier",), "Blocks given out to be filled, evicted ones included."),
    "pagemgr_block_releases_total": (("tier",), "Times that a block lost its last reference."),
    "pagemgr_evictions_total": (("tier", "policy", "reason"), "Cached blocks that were given up."),
    "pagemgr_allocation_failures_total": (("reason",), "Calls that were refused for want of room."),
    # Tiers
    "pagemgr_swap_sequences_total": (("direction",), "Sequences moved to the host (out) or back to the device (in)."),
    "pagemgr_swap_blocks_total": (("direction",), "Blocks copied to move sequences."),
    "pagemgr_swap_bytes_total": (("direction",), "Bytes copied to move sequences."),
    "pagemgr_swap_failures_total": (("direction",), "Moves that failed or were cancelled."),
    # Health
    "pagemgr_invariant_violations_total": ((), "Checks of the pool that failed: must stay 0."),
}
