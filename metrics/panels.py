"""What the dashboard shows: each panel with its queries, and what to do when it looks wrong.

``@`` in a query stands for the labels that the dashboard's variables choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["timeseries", "stacked", "gauge", "stat", "heatmap", "table"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    unit: str
    """As Grafana calls it: ``percentunit`` shows a ratio, ``bytes``, ``s``, ``ops``, ``short`` and so on."""
    queries: dict[str, str]
    """Legend → PromQL."""
    description: str
    """What is to be seen, and what to do when it looks wrong."""
    shape: Shape = "timeseries"
    warn: float | None = None
    """From here on it looks wrong: the colour is orange."""
    bad: float | None = None
    """From here on it is wrong: the colour is red."""


def _rate(metric: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{@{where}}}[$__rate_interval]))"


def _quantile(quantile: float, metric: str, by: str) -> str:
    return f"histogram_quantile({quantile}, {_rate(f'{metric}_bucket', f'le, {by}')})"


def _per(amount: str, base: str) -> str:
    """A quotient that is absent where there is nothing to divide by."""
    return f"{amount} / ({base} > 0)"


_USABLE = 'sum by (pool, instance, tier) (pagemgr_blocks{@, state!="null"})'
_HELD = 'sum by (pool, instance, tier) (pagemgr_blocks{@, state=~"open|full|fenced"})'
_ROOM = 'sum by (pool, instance) (pagemgr_blocks{@, tier="device", state=~"free|cached"})'
_CACHED = 'sum by (pool, instance, tier) (pagemgr_blocks{@, state="cached"})'
_WHO = "{{pool}} {{instance}}"

CAPACITY = (
    Panel(
        "Held now",
        "percentunit",
        {f"{_WHO} {{{{tier}}}}": f"{_HELD} / {_USABLE}"},
        "Share of the blocks that sequences hold or a fence keeps: what can neither be given out nor evicted. Above "
        "95 % of the device, admission stalls: admit fewer sequences, enlarge the pool, or give it a host tier to "
        "swap to.",
        "gauge",
        warn=0.85,
        bad=0.95,
    ),
    Panel(
        "Device memory by cause",
        "bytes",
        {"{{cause}}": 'sum by (cause) (pagemgr_pool_bytes{@, tier="device"})'},
        "Every byte of the device tier. Much cached is good: it is reused, and given up when needed. Much free in a "
        "busy pool means that it is larger than the load. Growing full and open_used without more sequences: look "
        "for sequences that nobody frees.",
        "stacked",
    ),
    Panel(
        "Room left, in tokens",
        "short",
        {_WHO: f"{_ROOM} * on (pool, instance) pagemgr_block_size_tokens{{@}}"},
        "New tokens that fit before a reserve fails: free and cached blocks. Near 0, expect refusals. It should "
        "stay above one step of all running sequences. With several layer groups, each takes a slot: divide by them.",
    ),
    Panel(
        "Sequences",
        "short",
        {
            f"{_WHO} {{{{tier}}}}": "sum by (pool, instance, tier) (pagemgr_sequences{@})",
            f"{_WHO} most": "pagemgr_max_sequences{@}",
        },
        "Live sequences against the most there can be. At the limit, add raises OutOfSequences though blocks are "
        "free: raise pool.max_sequences.",
    ),
    Panel(
        "Tail waste",
        "percentunit",
        {f"{_WHO} {{{{tier}}}}": "pagemgr_internal_fragmentation_ratio{@}"},
        "Share of the slots in held blocks that hold no token yet: half a block for each sequence. Above 10 %, "
        "sequences are short for the block size: a smaller pool.block_size wastes less.",
        warn=0.1,
    ),
)

REUSE = (
    Panel(
        "Prefix hit ratio",
        "percentunit",
        {
            _WHO: _per(
                _rate("pagemgr_prefix_hit_tokens_total", "pool, instance"),
                _rate("pagemgr_prefix_query_tokens_total", "pool, instance"),
            )
        },
        "Share of the prompt tokens that need no computing. A sudden drop: a changed system prompt, a new namespace "
        "for each request, or a cache that is too small (see how long a cached block stays).",
    ),
    Panel(
        "Prompt tokens, and those found by tier",
        "short",
        {
            "asked for": _rate("pagemgr_prefix_query_tokens_total", "job"),
            "found on {{tier}}": _rate("pagemgr_prefix_hit_tokens_total", "tier"),
            "of these in part of a block": _rate("pagemgr_prefix_partial_hit_tokens_total", "job"),
        },
        "Tokens a second. What is asked for and not found has to be computed; what is found in part of a block or on "
        "the host is copied. If most is found on the host, the device tier is too small.",
    ),
    Panel(
        "Saved by sharing",
        "bytes",
        {f"{_WHO} {{{{tier}}}}": "pagemgr_sharing_saved_bytes{@}"},
        "Memory that the same sequences would need on top without sharing. It falls to 0 when prefix caching is off "
        "(prefix.enabled) or no two prompts begin alike.",
    ),
    Panel(
        "Copies on write, and duplicates",
        "ops",
        {
            f"{_WHO} copied": _rate("pagemgr_cow_copies_total", "pool, instance"),
            f"{_WHO} computed twice": _rate("pagemgr_duplicate_blocks_total", "pool, instance"),
        },
        "Blocks a second. Copies follow forks, one for each at most. Many computed twice: equal prompts are "
        "admitted in the same step; admit one first, and the others find its blocks.",
    ),
)

PRESSURE = (
    Panel(
        "Refused calls",
        "ops",
        {f"{_WHO} {{{{reason}}}}": _rate("pagemgr_allocation_failures_total", "pool, instance, reason")},
        "Calls that found no room. A few are how an engine learns that it must preempt. More than one in ten steps: "
        "admit fewer sequences. out_of_sequences: raise pool.max_sequences. sequence_too_long: raise "
        "pool.max_seq_len, or refuse such prompts earlier.",
    ),
    Panel(
        "Evictions",
        "ops",
        {
            f"{_WHO} {{{{tier}}}} {{{{policy}}}} {{{{reason}}}}": _rate(
                "pagemgr_evictions_total", "pool, instance, tier, policy, reason"
            ),
            f"{_WHO} cleared": _rate("pagemgr_cleared_blocks_total", "pool, instance"),
        },
        "Cached blocks given up a second. Normal in a full pool; harmful if the hit ratio falls at the same time: "
        "compare policies on your own trace with `pagemgr replay --policy all`.",
    ),
    Panel(
        "Evicted, then wanted again",
        "percentunit",
        {
            _WHO: _per(
                _rate("pagemgr_evicted_wanted_blocks_total", "pool, instance"),
                _rate("pagemgr_evictions_total", "pool, instance"),
            )
        },
        "Share of the evicted blocks that a prompt asked for not long after. Above a fifth the pool thrashes: enlarge "
        "it, give it a host cache (pool.host_cache), or try another policy.",
        warn=0.2,
    ),
    Panel(
        "How long a cached block stays",
        "s",
        {
            f"{_WHO} {{{{tier}}}}": _per(
                _CACHED,
                _rate("pagemgr_evictions_total", "pool, instance, tier"),
            )
        },
        "Cached blocks divided by evictions a second. Shorter than the pause between two turns of a conversation, "
        "and second turns find nothing: enlarge the pool, or add a host tier.",
    ),
    Panel(
        "Blocks that wait for a fence",
        "short",
        {f"{_WHO} {{{{tier}}}}": 'pagemgr_blocks{@, state="fenced"}'},
        "Released, but something in flight may still read them. It rises and falls with the steps in flight. If it "
        "only rises, an event that was given to free is never recorded or never passes.",
    ),
    Panel(
        "Steps taken back",
        "percentunit",
        {
            _WHO: _per(
                _rate("pagemgr_steps_aborted_total", "pool, instance"),
                f"({_rate('pagemgr_steps_committed_total', 'pool, instance')} + "
                f"{_rate('pagemgr_steps_aborted_total', 'pool, instance')})",
            )
        },
        "Share of the steps that were aborted: their work was lost. Above a few percent, look into the engine's log "
        "for why forward passes fail.",
        warn=0.05,
    ),
)

TIERS = (
    Panel(
        "Host memory by cause",
        "bytes",
        {"{{cause}}": 'sum by (cause) (pagemgr_pool_bytes{@, tier="host"})'},
        "Every byte of the host tier. If swapped fills it, swap_out raises OutOfBlocks and sequences must start "
        "over: raise pool.host_size.",
        "stacked",
    ),
    Panel(
        "Swapped",
        "Bps",
        {"{{direction}}": _rate("pagemgr_swap_bytes_total", "direction")},
        "Bytes a second in each direction. Steady traffic both ways means that sequences are moved out only to be "
        "needed again: admit fewer of them.",
    ),
    Panel(
        "Time of a move",
        "s",
        {
            "{{direction}} median": _quantile(0.5, "pagemgr_swap_seconds", "direction"),
            "{{direction}} 99 %": _quantile(0.99, "pagemgr_swap_seconds", "direction"),
        },
        "From the first byte to the last. It grows with the blocks of a move; a tail far above the median is "
        "contention for the bus or for memory. Points on the line, if exemplars are stored, name the blocks and the "
        "trace.",
    ),
    Panel(
        "Speed of a move",
        "Bps",
        {
            "{{direction}}": _per(
                _rate("pagemgr_swap_bytes_total", "direction"),
                _rate("pagemgr_swap_seconds_sum", "direction"),
            )
        },
        "Bytes over the time spent moving them. Expect what the bus gives: about 25 GB/s on PCIe 4, 50 on PCIe 5. A "
        "small part of that means small blocks or memory that is not pinned.",
    ),
    Panel(
        "Host cache",
        "Bps",
        {
            "{{direction}}": "sum by (direction) (rate(pagemgr_host_cache_blocks_total{@}[$__rate_interval]) "
            "* on (job, instance, pool) group_left pagemgr_block_bytes{@})",
        },
        "Bytes a second that go down when the device evicts them (out), and that come up because a prompt needs them "
        "(in). Much out and hardly any in: nothing of it is wanted again, and the host tier is better left to swaps.",
    ),
    Panel(
        "Time of a move of the host cache",
        "s",
        {
            "{{direction}} median": _quantile(0.5, "pagemgr_host_cache_seconds", "direction"),
            "{{direction}} 99 %": _quantile(0.99, "pagemgr_host_cache_seconds", "direction"),
        },
        "Of one move in 13. If what comes up takes longer than computing its tokens again, the host cache costs more "
        "than it saves: turn it off.",
    ),
    Panel(
        "Moves and failures",
        "ops",
        {
            "{{direction}}": _rate("pagemgr_swap_sequences_total", "direction"),
            "{{direction}} failed": _rate("pagemgr_swap_failures_total", "direction"),
            "host cache failed": _rate("pagemgr_host_cache_failures_total", "job"),
        },
        "Sequences a second. A swap that fails leaves the sequence where it was and raises TransferFailed; blocks of "
        "the host cache that cannot come up are computed again. The log says why.",
    ),
)

KERNELS = (
    Panel(
        "Time of a step",
        "s",
        {
            "{{phase}} median": _quantile(0.5, "pagemgr_step_seconds", "phase"),
            "{{phase}} 99 %": _quantile(0.99, "pagemgr_step_seconds", "phase"),
        },
        "From reserve to commit, model included. If decode grows while the number of sequences does not, look at "
        "the calls beside this; if they do not grow, the time is the model's or the host's.",
    ),
    Panel(
        "Time of one backend call",
        "s",
        {
            "{{op}}": _per(
                _rate("pagemgr_kernel_seconds_sum", "op"),
                _rate("pagemgr_kernel_seconds_count", "op"),
            )
        },
        "Mean over one layer of a step. Times the number of layers, it is attention's share of the step. Unexpectedly "
        "slow: see below which backend runs, and run `pagemgr doctor` for why a faster one does not.",
    ),
    Panel(
        "Decode steps by time",
        "s",
        {"{{le}}": 'sum by (le) (increase(pagemgr_step_seconds_bucket{@, phase="decode"}[$__rate_interval]))'},
        "Two bands mean two kinds of batches, such as small and large ones. A band that splits after a rollout is a "
        "regression.",
        "heatmap",
    ),
    Panel(
        "Tokens computed",
        "short",
        {
            f"{_WHO} a second": _rate("pagemgr_tokens_committed_total", "pool, instance"),
            f"{_WHO} a step": _per(
                _rate("pagemgr_tokens_committed_total", "pool, instance"),
                _rate("pagemgr_steps_committed_total", "pool, instance"),
            ),
            f"{_WHO} refused drafts": _rate("pagemgr_draft_tokens_total", "pool, instance"),
        },
        "New tokens of the steps that ran. Few tokens a step with many sequences waiting: the engine's batches are "
        "too small.",
    ),
)

HEALTH = (
    Panel(
        "Pools that can be read",
        "short",
        {_WHO: "pagemgr_up{@}"},
        "1 is well. 0: a snapshot failed, and everything else of that pool is missing here; the process's log has "
        "the error, which is most often a device that is gone.",
        "stat",
    ),
    Panel(
        "Invariant violations",
        "short",
        {_WHO: "pagemgr_invariant_violations_total{@}"},
        "Must be 0. Anything else is a bug, and answers may be wrong: take the process out of service and report it "
        "with its log.",
        "stat",
        bad=1,
    ),
    Panel(
        "Bytes that no cause explains",
        "bytes",
        {f"{_WHO} {{{{tier}}}}": "pagemgr_unaccounted_bytes{@}"},
        "Must be 0. Anything else is a bug in the accounting: report it.",
        "stat",
        bad=1,
    ),
    Panel(
        "Hash collisions",
        "short",
        {_WHO: "pagemgr_prefix_collisions_total{@}"},
        "Must be 0. A block was found by its name and held other tokens: it was not used. Names are SHA-256, so memory "
        "is broken, or somebody forges them: test the memory, set prefix.secret.",
        "stat",
        bad=1,
    ),
    Panel(
        "Steps in flight",
        "short",
        {_WHO: "pagemgr_steps_in_flight{@}"},
        "0 or 1 for an engine that waits for each step, a few for one that overlaps them. If it stays up while "
        "nothing commits, the engine hangs or has lost a step.",
    ),
    Panel(
        "What runs",
        "short",
        {"backend": "pagemgr_backend_info{@}", "versions": 'pagemgr_build_info{job=~"$job", instance=~"$instance"}'},
        "Ranks of one model must agree in all of it. Another backend than expected: run `pagemgr doctor` on that "
        "machine.",
        "table",
    ),
)

ROWS = {
    "Capacity": CAPACITY,
    "Reuse": REUSE,
    "Pressure": PRESSURE,
    "Tiers": TIERS,
    "Kernels": KERNELS,
    "Health": HEALTH,
}
