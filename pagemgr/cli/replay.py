"""``pagemgr replay``: what a pool of a given size would have made of a trace, or what came of a manager's calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from pagemgr.assembly import HOST_CACHES
from pagemgr.config import Config, ModelConfig, PoolConfig
from pagemgr.eviction import names
from pagemgr.recording import is_log
from pagemgr.replay import Replay, Sample, replay
from pagemgr.traces import read_trace
from pagemgr.values import parse_bytes

from .calls import print_log
from .comparison import compare, draw
from .output import print_json, print_table
from .picture import require_matplotlib

ALL = "all"
BAR = 40
ROWS = 12


def _known(ctx: click.Context, _: click.Parameter, policies: tuple[str, ...]) -> tuple[str, ...]:
    for name in policies:
        if name not in (ALL, *names()):
            raise click.BadParameter(f"{name!r} is not one of {', '.join((ALL, *names()))}")
    return policies


@click.command("replay")
@click.argument("trace", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    multiple=True,
    help="Usable blocks of the pool; several, to compare.",
)
@click.option("--block-size", type=click.IntRange(min=1), help="Tokens of a block.")
@click.option(
    "--policy",
    "policies",
    default=("lru",),
    show_default=True,
    multiple=True,
    callback=_known,
    help=f"Eviction policy: {', '.join(names())}; several or {ALL}, to compare.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Where to draw the comparison, a PNG: hit ratio against blocks.",
)
@click.option(
    "--with-data", is_flag=True, help="Give blocks real contents, move them to the host and back, and compare."
)
@click.option(
    "--windows",
    default="0",
    show_default=True,
    help="Tokens that each layer sees, 0 for all; with --num-layers a shorter list repeats, as in model.windows.",
)
@click.option("--num-layers", type=click.IntRange(min=1), default=1, show_default=True, help="Layers of the model.")
@click.option("--host-blocks", type=click.IntRange(min=0), default=0, show_default=True, help="Usable host blocks.")
@click.option(
    "--host-cache",
    type=click.Choice(HOST_CACHES),
    default="off",
    show_default=True,
    help="Whether evicted blocks go down to the host, and stay there when they come up.",
)
@click.option("--token-bytes", default="128KiB", show_default=True, help="K and V of a token: an 8B model's in bf16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(
    ctx: click.Context,
    trace: str,
    blocks: tuple[int, ...],
    block_size: int | None,
    policies: tuple[str, ...],
    picture: Path | None,
    with_data: bool,
    windows: str,
    num_layers: int,
    host_blocks: int,
    host_cache: str,
    token_bytes: str,
    as_json: bool,
) -> None:
    """Replay a trace of requests, or the log of a manager's calls.

    A trace is JSON lines, gzipped or not, in the schema of Mooncake, of the agentic coding traces, or of Azure's
    lengths. Its requests run one at a time from a cold cache, in a pool of --blocks and --block-size. Several policies
    or pool sizes are compared by hit ratio, beside the best that was possible: Belady's optimum.

    A log is what debug.record wrote. Its calls are made again on a manager like the one that was recorded, and the exit
    code is 1 if anything else came of one.
    """
    if is_log(trace):
        print_log(ctx, trace, as_json)
        return
    for name, value in (("--blocks", blocks), ("--block-size", block_size)):
        if not value:
            raise click.MissingParameter("A trace needs it.", ctx, param_hint=name, param_type="option")
    assert block_size is not None
    chosen = names() if ALL in policies else list(dict.fromkeys(policies))
    model = ModelConfig(num_layers=num_layers, num_kv_heads=1, head_dim=1, windows=windows)  # type: ignore[arg-type]
    groups = Config(model=model, pool=PoolConfig(num_blocks=2)).layer_groups
    tiers = _Tiers(tuple(group.window for group in groups), host_blocks, host_cache)
    if with_data and tiers != _Tiers():
        raise click.BadParameter("compares bytes of one kind of layers and no host cache", ctx, None, "--with-data")
    if len(chosen) == len(blocks) == 1 and picture is None:
        _replay_one(trace, blocks[0], block_size, chosen[0], with_data, tiers, parse_bytes(token_bytes), as_json)
        return
    if tiers != _Tiers():
        raise click.BadParameter("layers and host tiers are compared one --policy and --blocks at a time", ctx)
    if with_data:
        raise click.BadParameter(
            "compares bytes, not policies: give one --policy and one --blocks", ctx, None, "--with-data"
        )
    _compare(trace, sorted(set(blocks)), block_size, chosen, picture, as_json)


def _compare(
    trace: str, blocks: list[int], block_size: int, policies: list[str], picture: Path | None, as_json: bool
) -> None:
    if picture is not None:
        require_matplotlib()
    comparison = compare(read_trace(trace), blocks, block_size, policies)
    if picture is not None:
        draw(picture, f"{Path(trace).name}, blocks of {block_size} tokens", comparison)
    if as_json:
        print_json(
            {
                "trace": trace,
                "block_size": block_size,
                "blocks": comparison.blocks,
                "hit_ratio": dict(comparison.ratios),
            }
        )
    else:
        title = f"{trace}: hit ratio by usable blocks (and how much of the gap to the optimum it closes)"
        print_table(title, ("policy", *(f"{size:,}" for size in comparison.blocks)), comparison.rows())


@dataclass(frozen=True, slots=True)
class _Tiers:
    """What there is besides a device pool for layers of one kind."""

    windows: tuple[int | None, ...] = (None,)
    host_blocks: int = 0
    host_cache: str = "off"


def _replay_one(
    trace: str,
    blocks: int,
    block_size: int,
    policy: str,
    with_data: bool,
    tiers: _Tiers,
    token_bytes: int,
    as_json: bool,
) -> None:
    requests = read_trace(trace)
    progress = track(requests, description="replaying", console=Console(stderr=True), transient=True)
    result = replay(progress, blocks, block_size, policy, with_data, **asdict(tiers))
    summary = dict(_summary(result, token_bytes // len(tiers.windows), policy))
    if as_json:
        over_time = [
            {"timestamp": s.timestamp, "used": s.used, "cached": s.cached, "free": s.free} for s in result.samples
        ]
        print_json({"trace": trace, **summary, "over_time": over_time})
        return
    print_table(
        trace, ("what", "figure"), [(name.replace("_", " "), _shown(name, value)) for name, value in summary.items()]
    )
    click.echo()
    legend = f"blocks over time (# used, : cached, of {blocks})"
    print_table(legend, ("time", "pool", "used", "cached", "free"), _over_time(result.samples, blocks))


def _summary(result: Replay, token_bytes: int, policy: str) -> Iterator[tuple[str, Any]]:
    device, counters = result.stats.device, result.stats.counters
    samples = result.samples
    yield "requests", result.requests
    yield "skipped_larger_than_pool", result.skipped
    yield "prompt_tokens", counters.prefix_query_tokens
    yield "hit_tokens", counters.prefix_hit_tokens
    yield "hit_ratio", round(result.stats.hit_ratio, 4)
    yield "device_hit_tokens", counters.prefix_hit_tokens - counters.prefix_host_hit_tokens
    yield "host_hit_tokens", counters.prefix_host_hit_tokens
    yield "demoted_blocks", counters.demoted_blocks
    yield "policy", policy
    yield "evicted_blocks", device.evicted_total
    yield "mean_used_ratio", round(sum(s.used for s in samples) / max(len(samples) * result.usable_blocks, 1), 4)
    yield "peak_used_ratio", round(max((s.used for s in samples), default=0) / result.usable_blocks, 4)
    yield "waste_ratio", round(result.waste_ratio, 4)
    served = max(len(samples), 1)
    yield "held_over_uniform_ratio", round(result.held_slots / max(result.uniform_slots, 1), 4)
    yield "paged_bytes_per_request", result.held_slots * token_bytes // served
    yield "contiguous_bytes_per_request", result.longest * result.num_groups * token_bytes
    yield "contiguous_over_paged", round(result.contiguous_slots / max(result.held_slots, 1), 2)
    yield "compared_tokens", result.compared_tokens
    yield "invariant_violations", counters.invariant_violations


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes_per_request"):
        return f"{value / 2**30:.3f} GiB"
    if name == "compared_tokens" and not value:
        return "none: ask with --with-data"
    return f"{value:.4f}" if name.endswith("ratio") else f"{value:,}" if isinstance(value, int) else str(value)


def _over_time(samples: tuple[Sample, ...], blocks: int) -> Iterator[tuple[str, str, int, int, int]]:
    """Means over equal runs of requests."""
    for i in range(min(ROWS, len(samples))):
        part = (
            samples[i * len(samples) // ROWS : (i + 1) * len(samples) // ROWS]
            if len(samples) >= ROWS
            else samples[i : i + 1]
        )
        used, cached, free = (
            round(sum(values) / len(part)) for values in zip(*((s.used, s.cached, s.free) for s in part), strict=True)
        )
        filled, kept = round(BAR * used / blocks), round(BAR * (used + cached) / blocks)
        bar = "#" * filled + ":" * (kept - filled) + "." * (BAR - kept)
        yield f"{part[0].timestamp:,.0f}", bar, used, cached, free
