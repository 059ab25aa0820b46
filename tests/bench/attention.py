"""Paged attention: every backend beside torch's attention over the same K and V already gathered, in one run.

    python -m tests.bench.attention --backend cpu
    python -m tests.bench.attention --backend cuda --backend triton --device cuda --dtype bfloat16
    python -m tests.bench.attention --backend cpu --threads 1 --only decode --json out.json --plot roofline.png --record

Each shape is built afresh, checked against the reference backend, then timed: the candidates take turns, and each is
given by its median. The ceiling of a shape is the time to read its K and V once, contiguous, in the same turns.

On one thread the clock is the thread's CPU time, which other work on the machine disturbs least; on more it is the
wall's, and on a GPU that of its events. A call includes the Python around it.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from pagemgr.backends import AttentionParams, Backend, KVLayer, create
from pagemgr.backends.conformance import TOLERANCE
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch
from pagemgr.cli.output import print_table
from pagemgr.layout import BlockLayout, DType, KVDType
from pagemgr.storage import Storage

from .roofline import draw

RESULTS = Path(__file__).with_name("RESULTS.md")
DTYPES = ("float32", "float16", "bfloat16")
SDPA, READ, REFERENCE = "sdpa", "read", "torch"
PATIENCE = 2.0
"""Seconds that one shape may be timed for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``batch`` sequences of ``context`` tokens, of which all (prefill) or one (decode) are new."""

    kind: str
    batch: int
    context: int
    kv_heads: int
    group: int
    head_dim: int

    @property
    def new(self) -> int:
        return self.context if self.kind == "prefill" else 1

    @property
    def kv_elements(self) -> int:
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of the two products, with each query multiplied by the keys that it sees."""
        seen = self.new * self.context - self.new * (self.new - 1) // 2
        return 4 * self.batch * self.kv_heads * self.group * self.head_dim * seen

    def __str__(self) -> str:
        return f"{self.kind} b{self.batch} n{self.context} kv{self.kv_heads}x{self.group} d{self.head_dim}"


DECODE = [
    Shape("decode", batch, context, kv_heads, group, head_dim)
    for batch, context in ((1, 128), (1, 2048), (1, 16384), (8, 1024), (16, 4096), (64, 128), (64, 1024))
    for kv_heads, group, head_dim in ((8, 1, 64), (8, 4, 128), (2, 8, 128), (4, 4, 256), (8, 1, 128))
]
PREFILL = [
    Shape("prefill", 1, context, kv_heads, group, head_dim)
    for context in (512, 2048)
    for kv_heads, group, head_dim in ((8, 1, 64), (8, 1, 128), (2, 4, 128), (1, 8, 256))
]


@dataclass(frozen=True, slots=True)
class Row:
    """One backend on one shape. Times in seconds."""

    shape: Shape
    backend: str
    seconds: float
    seconds_sdpa: float
    seconds_read: float
    seconds_reference: float | None
    bytes_read: int
    error: float

    @property
    def ratio(self) -> float:
        """Above 1: faster than torch on contiguous K/V."""
        return self.seconds_sdpa / self.seconds

    @property
    def share(self) -> float:
        """Of the time in which K and V, not quantised, can be read."""
        return self.seconds_read / self.seconds


class Bench:
    """Builds shapes on one device, and times what is called on them."""

    def __init__(
        self, backends: list[str], device: str, dtype: str, kv_dtype: str, threads: int, block_size: int
    ) -> None:
        self.backends, self.device, self.dtype, self.block_size = backends, torch.device(device), dtype, block_size
        self.kv_dtype, self.threads = kv_dtype, threads
        torch.set_num_threads(threads)
        self._generator = torch.Generator().manual_seed(0)

    def clock(self) -> Callable[[], float]:
        return time.thread_time if self.threads == 1 else time.perf_counter

    def run(self, shape: Shape) -> list[Row]:
        """Every backend on one shape; ``AssertionError`` if one is wrong."""
        query, kv, batch, key, value = self._build(shape)
        params, layout = AttentionParams(), self._layout(shape)
        made = {name: create(name, layout, shape.group, self.device) for name in [*self.backends, REFERENCE]}
        calls = {name: _call(backend, query, kv, batch, params) for name, backend in made.items()}
        heads = query.view(shape.batch, shape.new, -1, shape.head_dim).transpose(1, 2).contiguous()
        causal, grouped = shape.new > 1, shape.group > 1
        calls[SDPA] = lambda: F.scaled_dot_product_attention(heads, key, value, is_causal=causal, enable_gqa=grouped)
        # A copy, so that no K and V are read twice in a turn: they would stay in a large cache, and the others leave it.
        flat = [part.clone().view(-1).view(torch.float32) for part in (key, value)]
        calls[READ] = lambda: flat[0].dot(flat[0]) + flat[1].dot(flat[1])
        expected = calls[REFERENCE]().double()
        errors = {name: float((calls[name]().double() - expected).abs().max()) for name in self.backends}
        tolerance = TOLERANCE[query.dtype] * max(1.0, float(expected.abs().max()))
        for name, error in errors.items():
            assert error <= tolerance, f"{name} on {shape}: off by {error}, more than {tolerance}"
        times = self._time(calls)
        held = layout.token_bytes * shape.batch * shape.context
        return [
            Row(shape, name, times[name], times[SDPA], times[READ], times[REFERENCE], held, errors[name])
            for name in self.backends
        ]

    def _layout(self, shape: Shape) -> BlockLayout:
        return BlockLayout(
            1, shape.kv_heads, shape.head_dim, self.block_size, DType(self.dtype), KVDType(self.kv_dtype)
        )

    def _build(self, shape: Shape) -> tuple[torch.Tensor, KVLayer, PagedBatch, torch.Tensor, torch.Tensor]:
        """Query, pool and batch with shuffled blocks; and keys and values ``[batch, heads, context, dim]``.

        The last two are of the query's dtype: what a quantised pool makes of them, if it is one.
        """
        dtype, width = getattr(torch, self.dtype), -(-shape.context // self.block_size)
        count = shape.batch * width
        table = (1 + torch.randperm(count, generator=self._generator)).view(shape.batch, width).to(self.device)
        made = Storage(self._layout(shape), {"device": 1 + count}, self.device, TorchBackend())
        (kv,) = made.layers
        new = torch.randn(2, (1 + count) * self.block_size, shape.kv_heads, shape.head_dim, generator=self._generator)
        key, value = new.to(self.device, dtype)
        TorchBackend().write_kv(key, value, kv, torch.arange(len(key), device=self.device))
        tokens = shape.batch * shape.new
        heads = shape.kv_heads * shape.group
        query = torch.randn(tokens, heads, shape.head_dim, generator=self._generator).to(self.device, dtype)
        batch = PagedBatch(
            block_table=table.to(torch.int32),
            seq_lens=torch.full((shape.batch,), shape.context, dtype=torch.int32, device=self.device),
            query_start=torch.arange(0, tokens + 1, shape.new, dtype=torch.int32, device=self.device),
            slot_mapping=torch.full((tokens,), -1, device=self.device),
            max_query_len=shape.new,
            max_seq_len=shape.context,
        )
        key, value = (
            (part[table] if scale is None else part[table].float() * scale[table].unsqueeze(-1))
            .transpose(1, 2)
            .flatten(2, 3)[:, :, : shape.context]
            .to(dtype)
            .contiguous()
            for part, scale in ((kv.key, kv.key_scale), (kv.value, kv.value_scale))
        )
        return query, kv, batch, key, value

    def _time(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each; they take turns until the patience is over, the slowest ones less often."""
        once = {name: self._seconds(call) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        share = PATIENCE / len(calls)
        rounds = {name: max(3, min(200, int(share / seconds))) for name, seconds in once.items()}
        for turn in range(max(rounds.values())):
            for name, call in calls.items():
                if turn < rounds[name]:
                    samples[name].append(self._seconds(call))
        return {name: statistics.median(taken) for name, taken in samples.items()}

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        clock = self.clock()
        start_time = clock()
        call()
        return clock() - start_time

    def peak_flops(self) -> float:
        """What torch's own matrix product reaches here, in flop/s."""
        a, b = torch.randn(2, 1024, 1024, device=self.device, dtype=getattr(torch, self.dtype))
        return 2 * 1024**3 / self._time({"matmul": lambda: a @ b})["matmul"]

    def hardware(self) -> str:
        """What the numbers were taken on, in a few words."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        return f"{_processor()}, {self.threads} thread(s), torch {torch.__version__}"


def _call(
    backend: Backend, query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams
) -> Callable[[], torch.Tensor]:
    out = torch.empty_like(query)
    return lambda: backend.attention(query, kv, batch, params, out=out)


def _processor() -> str:
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


COLUMNS = ("shape", "backend", "µs", "× sdpa", "× torch", "GB/s", "of read", "GFLOP/s", "error")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of ``COLUMNS``."""
    reference = math.nan if row.seconds_reference is None else row.seconds_reference / row.seconds
    return (
        str(row.shape),
        row.backend,
        f"{row.seconds * 1e6:.0f}",
        f"{row.ratio:.2f}",
        f"{reference:.1f}",
        f"{row.bytes_read / row.seconds / 1e9:.1f}",
        f"{row.share:.0%}",
        f"{row.shape.flops / row.seconds / 1e9:.0f}",
        f"{row.error:.0e}",
    )


def record(rows: list[Row], bench: Bench) -> None:
    """Append the table to RESULTS.md."""
    lines = [f"\n## {datetime.now(UTC):%Y-%m-%d}, {', '.join(bench.backends)}, {bench.dtype}, K/V {bench.kv_dtype}\n"]
    lines.append(
        f"{bench.hardware()}; commit {_commit()}; `python -m tests.bench.attention {' '.join(sys.argv[1:])}`\n"
    )
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


@click.command()
@click.option("--backend", "backends", multiple=True, default=("cpu",), show_default=True, help="May be repeated.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--kv-dtype", type=click.Choice([kind.value for kind in KVDType]), default="auto", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Of torch and of the cpu backend.")
@click.option("--block-size", default=16, show_default=True)
@click.option("--only", type=click.Choice(("decode", "prefill")), help="One kind of shape; both unless given.")
@click.option("--match", default="", help="Only shapes whose name contains this, such as 'b1 '.")
@click.option("--json", "json_file", type=Path, help="Write every number to this file.")
@click.option("--plot", type=Path, help="Draw a roofline to this PNG file.")
@click.option("--record", "recorded", is_flag=True, help="Append the table to tests/bench/RESULTS.md.")
def main(
    backends: tuple[str, ...],
    device: str,
    dtype: str,
    kv_dtype: str,
    threads: int,
    block_size: int,
    only: str | None,
    match: str,
    json_file: Path | None,
    plot: Path | None,
    recorded: bool,
) -> None:
    """Time paged attention beside torch's own on the same K and V, contiguous."""
    bench = Bench(list(backends), device, dtype, kv_dtype, threads, block_size)
    shapes = [shape for shape in DECODE + PREFILL if only in {None, shape.kind} and match in str(shape)]
    rows = []
    for shape in shapes:
        rows += bench.run(shape)
        click.echo("  ".join(cells(rows[-1])), err=True)
    print_table(f"{bench.hardware()}, {dtype}, blocks of {block_size}", COLUMNS, [cells(row) for row in rows])
    misses = [row for row in rows if row.ratio < (0.8 if row.shape.kind == "prefill" else 1)]
    click.echo(f"{len(rows) - len(misses)} of {len(rows)} rows reach their goal (decode 1 × sdpa, prefill 0.8 ×)")
    if json_file is not None:
        found = {
            "hardware": bench.hardware(),
            "commit": _commit(),
            "dtype": dtype,
            "rows": [asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(found, indent=2))
    if plot is not None:
        points = {
            name: [
                (row.shape.flops / row.bytes_read, row.shape.flops / row.seconds) for row in rows if row.backend == name
            ]
            for name in backends
        }
        points[SDPA] = [(row.shape.flops / row.bytes_read, row.shape.flops / row.seconds_sdpa) for row in rows]
        bandwidth = max(row.bytes_read / row.seconds_read for row in rows)
        draw(plot, f"{bench.hardware()}, {dtype}", bandwidth, bench.peak_flops(), points)
    if recorded:
        record(rows, bench)


if __name__ == "__main__":
    main()
