"""``pagemgr plan``: how large a pool a model needs, what it wastes, what a swap costs, and which knob to turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from pagemgr.config import MAX_SEQ_LEN_CAP, PoolConfig
from pagemgr.layout import DType, KVDType, LayerGroup
from pagemgr.values import parse_bytes

from .output import amount, print_json, print_table
from .shape import Shape, read_shape

BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
FAST_COPY = 64 * 1024
"""Bytes from which copies between host and device come close to what the link gives (tests/bench/RESULTS.md)."""
ROLLBACK: int = PoolConfig.model_fields["rollback"].default
MAX_SEQUENCES: int = PoolConfig.model_fields["max_sequences"].default
FEW = 16
"""Sequences at once, below which each counts."""
MUCH_WASTE = 0.02
"""Share of a sequence's memory from which the unfilled tail is worth a smaller block."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A pool for one rank."""

    shape: Shape
    memory: int
    block_size: int
    context: int
    link: int
    """Bytes a second between host and device."""

    @property
    def block_bytes(self) -> int:
        """Of one block, which holds the layers of one group."""
        return len(self.shape.groups[0].layers) * self.shape.layer_bytes * self.block_size

    @property
    def num_blocks(self) -> int:
        """What fits, the null block included."""
        return self.memory // self.block_bytes

    @property
    def blocks_per_sequence(self) -> int:
        """At the planned context, in all groups."""
        return sum(self._blocks_of(group) for group in self.shape.groups)

    def _blocks_of(self, group: LayerGroup) -> int:
        whole = -(-self.context // self.block_size)
        if group.window is None:
            return whole
        return min(-(-(group.window + ROLLBACK) // self.block_size) + 1, whole)

    @property
    def sequences(self) -> int:
        """At once, at the planned context, if nothing is shared."""
        return max(self.num_blocks - 1, 0) // self.blocks_per_sequence

    @property
    def longest(self) -> int:
        """Tokens that one sequence can have if it has the pool for itself."""
        return max(self.num_blocks - 1, 0) // len(self.shape.groups) * self.block_size

    @property
    def sequence_bytes(self) -> int:
        """Of one sequence at the planned context."""
        return self.blocks_per_sequence * self.block_bytes

    def waste(self, block_size: int) -> float:
        """Mean share of a sequence's memory that its unfilled last block is, half a block on average."""
        unfilled = (block_size - 1) / 2
        return unfilled / (self.context + unfilled)

    def swap_seconds(self) -> float:
        """To move one such sequence to the host or back, at the speed of the link."""
        return self.sequence_bytes / self.link


def advice(plan: Plan) -> Iterator[str]:
    """What to change and why, the most pressing first."""
    shape = plan.shape
    if plan.sequences == 0:
        fits = f"set pool.max_seq_len to {plan.longest}" if plan.longest else "not even two blocks fit"
        yield (
            f"no sequence of {plan.context:,} tokens fits: it needs {amount(plan.sequence_bytes)} beside the null "
            f"block, the pool has {amount(plan.memory)}; {fits}, give more memory, or split over more ranks"
        )
    if shape.max_context is not None and plan.context > shape.max_context:
        yield f"the model was made for {shape.max_context:,} tokens, the plan is for {plan.context:,}"
    if shape.dtype is DType.float32:
        yield "bfloat16 or float16 would hold twice as many tokens: set model.dtype if the model runs in it"
    if plan.context > MAX_SEQ_LEN_CAP:
        yield f"set pool.max_seq_len = {plan.context}: unless told, it is at most {MAX_SEQ_LEN_CAP:,} tokens"
    if plan.sequences > MAX_SEQUENCES:
        yield f"set pool.max_sequences = {plan.sequences}: there is memory for more than the default {MAX_SEQUENCES}"
    if plan.block_size > 1 and plan.waste(plan.block_size) > MUCH_WASTE:
        smaller = max(size for size in (*BLOCK_SIZES, 1) if size == 1 or plan.waste(size) <= MUCH_WASTE)
        waste = f"{plan.waste(plan.block_size):.1%}"
        yield f"set pool.block_size = {smaller}: unfilled tails waste {waste} of what sequences hold"
    if plan.block_bytes < FAST_COPY:
        larger = next((size for size in BLOCK_SIZES if size * shape.token_bytes >= FAST_COPY), BLOCK_SIZES[-1])
        yield (
            f"but set pool.block_size = {larger} if you swap: a block is {amount(plan.block_bytes)}, and copies below "
            f"{amount(FAST_COPY)} are slower than the link"
        )
    if 0 < plan.sequences < FEW and shape.kv_dtype is KVDType.auto and not shape.latent_dim and not shape.head_dim % 2:
        quantised = replace(plan, shape=replace(shape, kv_dtype=KVDType.float8_e4m3fn))
        yield (
            f"set model.kv_dtype = {KVDType.float8_e4m3fn.value} if the model bears it: "
            f"{quantised.sequences} sequences at once instead of {plan.sequences}"
        )
    if shape.latent_dim:
        yield "the model keeps one latent for all heads (MLA): these are its sizes; blocks hold K and V per head today"
    if 0 < plan.sequences < FEW:
        more = (plan.sequences + 1) * plan.blocks_per_sequence + 1
        each = (plan.num_blocks - 1) // (plan.sequences + 1) // len(shape.groups) * plan.block_size
        missing = amount(more * plan.block_bytes - plan.memory)
        yield f"for one more sequence at once, give {missing} more memory, or plan for at most {each:,} tokens each"


@click.command("plan")
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A model's config.json, or its folder.")
@click.option("--layers", type=click.IntRange(1), help="By hand, instead of --model: layers that keep K and V.")
@click.option("--kv-heads", type=click.IntRange(1), help="By hand: K/V heads of a layer.")
@click.option("--head-dim", type=click.IntRange(1), help="By hand: elements of a head.")
@click.option(
    "--dtype", type=click.Choice([kind.value for kind in DType]), help="Of K and V; the model's unless given."
)
@click.option("--kv-dtype", type=click.Choice([kind.value for kind in KVDType]), default="auto", help="As stored.")
@click.option("--memory", required=True, help='For the pool, on each rank, such as "40GiB": what weights leave free.')
@click.option(
    "--context", type=click.IntRange(1), help="Tokens of a sequence; what the model was made for unless given."
)
@click.option("--block-size", type=click.IntRange(1), default=16, show_default=True, help="Tokens of a block.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="GPUs that share the heads.")
@click.option("--link", default="25GB", show_default=True, help="Bytes a second to the host: PCIe 4 x16 gives 25GB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: Path | None,
    layers: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    dtype: str | None,
    kv_dtype: str,
    memory: str,
    context: int | None,
    block_size: int,
    ranks: int,
    link: str,
    as_json: bool,
) -> None:
    """Size a pool: bytes a token, blocks, sequences, waste by block size, what a swap costs, and what to change.

    \b
    pagemgr plan --model ./Llama-3.1-8B --memory 40GiB --context 32768
    pagemgr plan --layers 80 --kv-heads 8 --head-dim 128 --ranks 4 --memory 30GiB --context 8192
    """
    kind = None if dtype is None else DType(dtype)
    shape = _by_hand(layers, kv_heads, head_dim, kind) if model is None else read_shape(model, kind)
    shape = replace(shape, kv_dtype=KVDType(kv_dtype))
    tokens = context or shape.max_context
    if tokens is None:
        raise click.UsageError("give --context: the model does not say how long its sequences are")
    plan = Plan(shape.split(ranks), parse_bytes(memory), block_size, tokens, parse_bytes(link))
    if plan.link < 1:
        raise click.BadParameter("must be at least 1 byte a second", param_hint="--link")
    if as_json:
        print_json(_document(plan))
        return
    print_table("the pool, on each rank", ("what", "figure"), _rows(plan))
    click.echo()
    print_table("by block size", ("tokens", "a block", "blocks", "waste", "sequences"), _by_block_size(plan))
    click.echo()
    for knob in list(advice(plan)) or ["nothing: the defaults fit"]:
        click.echo(f"turn: {knob}")
    if not shape.latent_dim and plan.num_blocks >= 2:
        click.echo("\n" + "\n".join(_settings(plan)))


def _by_hand(layers: int | None, kv_heads: int | None, head_dim: int | None, dtype: DType | None) -> Shape:
    if layers is None or kv_heads is None or head_dim is None:
        raise click.UsageError("give --model, or --layers, --kv-heads and --head-dim")
    return Shape((0,) * layers, kv_heads, kv_heads, head_dim, dtype or DType.bfloat16)


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "token_bytes": plan.shape.token_bytes,
        "block_bytes": plan.block_bytes,
        "num_blocks": plan.num_blocks,
        "context": plan.context,
        "sequences": plan.sequences,
        "longest": plan.longest,
        "sequence_bytes": plan.sequence_bytes,
        "swap_seconds": plan.swap_seconds(),
        "waste_by_block_size": {str(size): plan.waste(size) for size in BLOCK_SIZES},
        "advice": list(advice(plan)),
    }


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    shape, groups = plan.shape, plan.shape.groups
    stored = shape.dtype.value if shape.kv_dtype is KVDType.auto else f"{shape.kv_dtype.value} and scales"
    yield "a token", f"{amount(shape.token_bytes)}: {len(shape.windows)} layers, {stored}"
    yield "a block", f"{amount(plan.block_bytes)}: {plan.block_size} tokens, {len(groups[0].layers)} layers"
    if len(groups) > 1:
        counts = Counter(f"the last {group.window:,} tokens" if group.window else "all tokens" for group in groups)
        yield "layer groups", ", ".join(f"{count} that keep {kept}" for kept, count in counts.items())
    yield "blocks", f"{plan.num_blocks:,} in {amount(plan.memory)}, one of them reserved"
    yield "sequences at once", f"{plan.sequences:,} of {plan.context:,} tokens, {amount(plan.sequence_bytes)} each"
    yield "the longest alone", f"{plan.longest:,} tokens"
    yield "a swap", f"{plan.swap_seconds() * 1e3:,.1f} ms a sequence and direction, at {plan.link / 1e9:,.1f} GB/s"


def _by_block_size(plan: Plan) -> Iterator[tuple[object, ...]]:
    for size in BLOCK_SIZES:
        other = Plan(plan.shape, plan.memory, size, plan.context, plan.link)
        yield (
            size,
            amount(other.block_bytes),
            f"{other.num_blocks:,}",
            f"{plan.waste(size):.2%}",
            f"{other.sequences:,}",
        )


def _settings(plan: Plan) -> Iterator[str]:
    shape = plan.shape
    yield "# pagemgr.toml: pagemgr config validate pagemgr.toml"
    yield "[model]"
    yield f"num_layers = {len(shape.windows)}"
    yield f"num_kv_heads = {shape.num_kv_heads}"
    if shape.num_q_heads != shape.num_kv_heads:
        yield f"num_q_heads = {shape.num_q_heads}"
    yield f"head_dim = {shape.head_dim}"
    yield f'dtype = "{shape.dtype.value}"'
    if shape.kv_dtype is not KVDType.auto:
        yield f'kv_dtype = "{shape.kv_dtype.value}"'
    if any(shape.windows):
        yield f"windows = {list(shape.windows)}"
    yield "[pool]"
    yield f"size = {plan.memory}"
    yield f"block_size = {plan.block_size}"
    yield f"max_seq_len = {min(plan.context, plan.longest)}"
    yield f"max_sequences = {max(plan.sequences, MAX_SEQUENCES)}"
    yield f"host_size = {plan.sequence_bytes + plan.block_bytes} # one sequence swapped out"
