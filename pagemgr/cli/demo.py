"""``pagemgr demo``: a chat-like workload through the real cache and attention, under memory pressure, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress

from pagemgr.cache import PagedKVCache
from pagemgr.config import Config, MetricsConfig, ModelConfig, PoolConfig
from pagemgr.metrics import Server, serve
from pagemgr.workload import chat

from .output import print_json, print_table
from .picture import draw, require_matplotlib
from .toy_engine import Moment, ToyEngine
from .toy_model import VOCABULARY

MODEL = ModelConfig(num_layers=2, num_kv_heads=4, num_q_heads=8, head_dim=32)
MAX_SEQ_LEN = 1024
TOLERANCE = 1e-4
"""Of hidden states around 1, computed in float32: a hundred times what rounding was seen to do."""
SHOWN = ("pagemgr_up", "pagemgr_pool_bytes", "pagemgr_prefix", "pagemgr_evictions", "pagemgr_swap_bytes", "pagemgr_inv")
"""Beginnings of the metrics that are shown at the end, where they are not those of the host tier."""

Summary = dict[str, int | float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much happens, and in how little memory."""

    conversations: int
    arrivals: int
    """Steps within which they begin."""
    num_blocks: int
    host_blocks: int
    verify_every: int
    """Replies from one that is verified to the next."""


SCALE = Scale(conversations=120, arrivals=700, num_blocks=512, host_blocks=256, verify_every=40)


@click.command("demo")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Of the workload and the weights: the same seed, the same table.",
)
@click.option(
    "--picture",
    default="pagemgr-demo.png",
    show_default=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Where to write the picture, a PNG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@click.pass_context
def command(ctx: click.Context, seed: int, picture: Path, as_json: bool) -> None:
    """A chat-like workload through the real cache and attention, on the CPU, and a picture of its memory.

    Shared system prompts, conversations of several turns, parallel replies and a pool that is too small for all of it.
    /metrics is live meanwhile. Exit code 1 if the cache's attention differs from attention without a cache.
    """
    require_matplotlib()
    if not picture.parent.is_dir():
        raise click.BadParameter(f"there is no directory {picture.parent}", ctx, param_hint="--picture")
    torch.set_num_threads(1)  # tensors this small are only slowed down by more
    cache = PagedKVCache(_config())
    workload = chat(seed, SCALE.conversations, VOCABULARY, MAX_SEQ_LEN, SCALE.arrivals)
    engine = ToyEngine(cache, workload, seed, SCALE.verify_every)
    with serve(cache) as server:
        click.echo(f"backend {cache.backend.name}; metrics are live at {server.url}", err=True)
        _run(engine, sum(turn.num_replies for conversation in workload for turn in conversation.turns))
        cache.manager.check()
        scraped = _scrape(server)
    summary = {"seed": seed, "conversations": len(workload), **_summary(engine)}
    draw(picture, engine.moments, int(summary["pool_bytes"]), MAX_SEQ_LEN)
    if as_json:
        print_json({**summary, "backend": cache.backend.name, "picture": str(picture)})
    else:
        print_table("what the cache did", ("measure", "value"), _rows(summary))
        click.echo("\n" + "\n".join(["some of what /metrics said at the end:", *scraped, "", f"picture: {picture}"]))
    if not summary["max_error"] <= TOLERANCE:
        click.echo(f"error: attention is off by {summary['max_error']:.1e}, more than {TOLERANCE:.0e}", err=True)
        ctx.exit(1)


def _config() -> Config:
    pool = PoolConfig(
        num_blocks=SCALE.num_blocks, host_blocks=SCALE.host_blocks, max_seq_len=MAX_SEQ_LEN, max_sequences=128
    )
    return Config(model=MODEL, pool=pool, device="cpu", metrics=MetricsConfig(port=0))


def _run(engine: ToyEngine, num_replies: int) -> None:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("replies", total=num_replies)
        while engine.busy:
            engine.tick()
            progress.update(task, completed=engine.replies_done)


def _scrape(server: Server) -> list[str]:
    connection = HTTPConnection(server.host, server.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return [line for line in lines if line.startswith(SHOWN) and 'tier="host"' not in line]


def _summary(engine: ToyEngine) -> Summary:
    """What the run comes to. Ratios over time weigh every step alike; waste is a share of bytes × steps."""
    cache, moments = engine.cache, engine.moments
    stats, layout = cache.stats(), cache.layout
    counters = stats.counters
    held = [_held(moment) for moment in moments]
    reserved = [moment.contiguous_reserved for moment in moments]
    capacity = stats.device.num_blocks * layout.block_bytes
    usable = capacity - stats.device.null * layout.block_bytes
    return {
        "replies": engine.replies_done,
        "steps": counters.steps_committed,
        "steps_aborted": counters.steps_aborted,
        "tokens_computed": counters.tokens_committed,
        "pool_bytes": capacity,
        "max_seq_len": cache.manager.max_seq_len,
        "utilization_peak": max(held) / usable,
        "utilization_mean": _mean(held) / usable,
        "prefix_hit_ratio": stats.hit_ratio,
        "prefix_hit_tokens": counters.prefix_hit_tokens,
        "saved_bytes_peak": max(moment.saved for moment in moments),
        "saved_bytes_mean": _mean([moment.saved for moment in moments]),
        "evicted_blocks": stats.device.evicted_total,
        "cow_copies": counters.cow_copies,
        "out_of_blocks": counters.failures["out_of_blocks"],
        "swapped_out": counters.swapped_sequences["out"],
        "swapped_in": counters.swapped_sequences["in"],
        "swapped_bytes": sum(counters.swapped_blocks.values()) * layout.block_bytes,
        "restarts": engine.restarts,
        "waste_paged": sum(moment.causes["tail_waste"] for moment in moments) / sum(held),
        "waste_contiguous": 1 - sum(moment.contiguous_used for moment in moments) / sum(reserved),
        "contiguous_bytes_peak": max(reserved),
        "contiguous_bytes_mean": _mean(reserved),
        "sequences_peak": max(moment.sequences for moment in moments),
        "sequences_contiguous": capacity // (cache.manager.max_seq_len * layout.token_bytes),
        "verified_replies": len(engine.verified),
        "max_error": max(error for error, _ in engine.verified),
        "invariant_violations": counters.invariant_violations,
    }


def _rows(s: Summary) -> list[tuple[str, str]]:
    pool = s["pool_bytes"]
    return [
        (
            "workload",
            f"{s['conversations']} conversations, {s['replies']} replies, {s['tokens_computed']:,} tokens computed",
        ),
        ("steps", f"{s['steps']:,}, and {s['steps_aborted']} aborted"),
        (
            "utilisation of the pool",
            f"peak {s['utilization_peak']:.1%}, mean {s['utilization_mean']:.1%} of {_mib(pool)}",
        ),
        ("prefix hit ratio", f"{s['prefix_hit_ratio']:.1%} of the prompt tokens"),
        ("saved by sharing", f"peak {_mib(s['saved_bytes_peak'])}, mean {_mib(s['saved_bytes_mean'])}"),
        ("evicted, copied on write", f"{s['evicted_blocks']:,} and {s['cow_copies']:,} blocks"),
        (
            "swapped for want of room",
            f"{s['swapped_out']} sequences out, {s['swapped_in']} back in, {_mib(s['swapped_bytes'])}",
        ),
        ("waste, paged", f"{s['waste_paged']:.1%} of what sequences hold"),
        (
            "waste, contiguous",
            f"{s['waste_contiguous']:.1%} of what it reserves: {s['max_seq_len']:,} tokens a sequence",
        ),
        (
            "contiguous would reserve",
            f"peak {_mib(s['contiguous_bytes_peak'])}, mean {_mib(s['contiguous_bytes_mean'])} for the same sequences",
        ),
        (
            "sequences at once",
            f"{s['sequences_peak']} in this pool, where {s['sequences_contiguous']} contiguous ones would fit",
        ),
        ("largest error", f"{s['max_error']:.1e} in {s['verified_replies']} replies computed again without a cache"),
        ("invariant violations", f"{s['invariant_violations']}"),
    ]


def _held(moment: Moment) -> int:
    """Bytes of the blocks that sequences hold."""
    return moment.causes["full"] + moment.causes["open_used"] + moment.causes["tail_waste"]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
