"""Paged attention: every backend beside its peers on the same K and V, in one run.

    python -m tests.bench.attention --backend cpu --threads 1 --json out.json --plot roofline.png --record
    python -m tests.bench.attention --device cuda --backend cuda --backend triton

Each shape is built afresh, with NaN wherever nothing was written; each output is compared with the reference in
float32; then the candidates take turns, and each is given by its median. Peers are torch's attention over K and V
already gathered and the ``torch`` backend on a CPU; on a GPU cuDNN (through torch, likewise contiguous),
FlashAttention-3 on blocks of 128 where ``fa3_fwd_interface`` can be imported, and, as "noted", the best paged peer that
was once measured on an H100 (see ``shapes``). Ceilings are those of the same run: reading the bytes of K and V
contiguously (on a CPU as many of them, on a GPU 2 GiB) and torch's own matrix product. What the clocks count is said in
``clocks``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import torch

from pagemgr.backends import Backend, create
from pagemgr.cli.output import print_table
from pagemgr.layout import KVDType

from . import ceilings, moving
from .clocks import CpuClock, GpuClock
from .peers import peers
from .problem import TOLERANCE, Problem, attend, build
from .roofline import draw
from .shapes import ON_CPU, ON_GPU, Shape, noted

RESULTS = Path(__file__).with_name("RESULTS.md")
DTYPES = ("float32", "float16", "bfloat16")
READ, NOTED = "read", "noted"


@dataclass(frozen=True, slots=True)
class Row:
    """One backend on one shape. Seconds, bytes/s and flop/s."""

    shape: str
    kind: str
    backend: str
    seconds: float
    bytes_read: int
    flops: int
    bandwidth: float
    """At which such bytes can be read."""
    faster: dict[str, float]
    """How many times as fast as each peer."""
    error: float


@dataclass(frozen=True)
class Table:
    """Rows as they are printed and recorded."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, *self.rows)]
        lines.insert(1, "|" + "---|" * len(self.columns))
        return "\n".join(lines)


class Bench:
    """Times shapes on one device."""

    def __init__(self, backends: Sequence[str], device: str, dtype: str, kv_dtype: str, threads: int) -> None:
        self.backends, self.device, self.dtype, self.kv_dtype = backends, torch.device(device), dtype, kv_dtype
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.clock = GpuClock() if self.device.type == "cuda" else CpuClock(threads)
        self.hardware = ceilings.hardware(self.device, threads)
        self.peak = ceilings.flops(self.clock, self.device, dtype)
        self._bandwidth = ceilings.gpu_bandwidth(self.clock) if isinstance(self.clock, GpuClock) else None

    def run(self, shape: Shape) -> list[Row]:
        """Every backend that can do this shape; ``AssertionError`` if one is wrong."""
        problem = build(shape, self.device, self.dtype, self.kv_dtype)
        outs = {name: torch.full_like(problem.query, torch.nan) for name in self.backends}
        calls = {name: attend(self.made(name, problem), problem, outs[name]) for name in self.backends}
        errors = {}
        for name, call in calls.items():
            call()
            errors[name] = problem.error(outs[name])
            assert errors[name] <= TOLERANCE[problem.query.dtype], f"{name} on {shape}: relative error {errors[name]}"
        others = peers(problem, self.dtype)
        ceiling = {} if self._bandwidth else {READ: ceilings.reading(problem)}
        times = self.clock.medians({**others, **calls, **ceiling})
        bandwidth = self._bandwidth or (problem.key.nbytes + problem.value.nbytes) / times[READ]
        rows = []
        for name in self.backends:
            faster = {peer: times[peer] / times[name] for peer in others if peer != name}
            once = noted(shape, times[name]) if (self.dtype, self.kv_dtype) == ("bfloat16", "auto") else None
            faster |= {} if once is None or not self._bandwidth else {NOTED: once}
            rows.append(
                Row(str(shape), shape.kind, name, times[name], problem.bytes_read, shape.flops, bandwidth, faster,
                    errors[name])
            )  # fmt: skip
        return rows

    def made(self, name: str, problem: Problem) -> Backend:
        return create(name, problem.layout, problem.shape.group, self.device)

    def moving(self) -> list[Table]:
        """What moves K and V; on a GPU, and before, what a call costs the host."""
        small = build(ON_GPU[0], self.device, self.dtype)
        made = {name: self.made(name, small) for name in self.backends}
        tables = []
        if isinstance(self.clock, GpuClock):
            tables.append(Table("a call of the host", moving.HOST, moving.host(made, self.device, self.dtype)))
        moved = moving.moved(made, self.clock, self.device, self.dtype)
        return [*tables, Table("moving K and V", moving.MOVED, moved)]


def attention_table(title: str, rows: Sequence[Row], peak: float) -> Table:
    """With a column for each peer that took part."""
    seen = list(dict.fromkeys(peer for row in rows for peer in row.faster))
    unit, per = ("TFLOP/s", 1e12) if peak > 1e13 else ("GFLOP/s", 1e9)
    columns = ("shape", "backend", "µs", "GB/s", "of read", unit, "of peak", *(f"× {peer}" for peer in seen), "error")
    return Table(title, columns, [
        (
            row.shape, row.backend, f"{row.seconds * 1e6:.1f}", f"{row.bytes_read / row.seconds / 1e9:.1f}",
            f"{row.bytes_read / row.seconds / row.bandwidth:.0%}", f"{row.flops / row.seconds / per:.0f}",
            f"{row.flops / row.seconds / peak:.0%}",
            *(f"{row.faster[peer]:.2f}" if peer in row.faster else "" for peer in seen), f"{row.error:.0e}",
        )
        for row in rows
    ])  # fmt: skip


def summary(rows: Sequence[Row]) -> list[str]:
    """For each backend, kind and peer: in how many rows it is at least as fast, and the worst of them."""
    lines = []
    for name, kind in dict.fromkeys((row.backend, row.kind) for row in rows):
        mine = [row for row in rows if (row.backend, row.kind) == (name, kind)]
        for peer in dict.fromkeys(peer for row in mine for peer in row.faster):
            ratios = [row.faster[peer] for row in mine if peer in row.faster]
            reached = sum(ratio >= 1 for ratio in ratios)
            lines.append(f"{name}, {kind}: at least {peer} on {reached} of {len(ratios)}, worst {min(ratios):.2f}")
    return lines


def commit() -> str:
    """Of the working tree."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def roofline(path: Path, title: str, rows: Sequence[Row], peak: float) -> None:
    """Backends and peers as points."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.backend, []).append((row.flops / row.bytes_read, row.flops / row.seconds))
        for peer, ratio in row.faster.items():
            points.setdefault(peer, []).append((row.flops / row.bytes_read, row.flops / row.seconds / ratio))
    draw(path, title, max(row.bandwidth for row in rows), peak, points)


@click.command()
@click.option("--backend", "backends", multiple=True, default=("cpu",), show_default=True, help="May be repeated.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="float32 on a CPU and bfloat16 on a GPU unless given.")
@click.option("--kv-dtype", type=click.Choice([kind.value for kind in KVDType]), default="auto", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Of torch and of the cpu backend.")
@click.option("--only", type=click.Choice(("decode", "prefill", "moving")), help="One part; all unless given.")
@click.option("--match", default="", help="Only shapes whose name contains this, such as 'b1 '.")
@click.option("--json", "json_file", type=Path, help="Write every number to this file.")
@click.option("--plot", type=Path, help="Draw a roofline to this PNG file.")
@click.option("--record", "recorded", is_flag=True, help="Append the tables to tests/bench/RESULTS.md.")
def main(
    backends: tuple[str, ...],
    device: str,
    dtype: str | None,
    kv_dtype: str,
    threads: int,
    only: str | None,
    match: str,
    json_file: Path | None,
    plot: Path | None,
    recorded: bool,
) -> None:
    """Time paged attention beside its peers."""
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    bench = Bench(backends, device, dtype, kv_dtype, threads)
    shapes = [shape for shape in (ON_GPU if on_gpu else ON_CPU) if only in {None, shape.kind} and match in str(shape)]
    rows: list[Row] = []
    for shape in shapes:
        rows += bench.run(shape)
        if on_gpu:
            torch.cuda.empty_cache()  # the next shape's tensors have other sizes
        click.echo(f"{rows[-1].shape}: {rows[-1].seconds * 1e6:.0f} µs", err=True)
    tables = []
    if rows:
        tables.append(attention_table(f"{dtype}, K/V {kv_dtype}", rows, bench.peak))
    if only == "moving" or not (only or match):
        tables += bench.moving()
    for table in tables:
        print_table(f"{bench.hardware}: {table.title}", table.columns, table.rows)
    for line in summary(rows):
        click.echo(line)
    facts = {"hardware": bench.hardware, "commit": commit(), "dtype": dtype, "kv_dtype": kv_dtype, "peak": bench.peak}
    if json_file is not None:
        found = {table.title: table.rows for table in tables} | {"rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(facts | found, indent=2))
    if plot is not None and rows:
        roofline(plot, f"{bench.hardware}, {dtype}", rows, bench.peak)
    if recorded:
        head = f"\n## {datetime.now(UTC):%Y-%m-%d}, {', '.join(backends)}, {dtype}, K/V {kv_dtype}\n\n"
        head += f"{bench.hardware}; commit {commit()}; `python -m tests.bench.attention {' '.join(sys.argv[1:])}`\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n\n".join((head, *(table.markdown() for table in tables))) + "\n")


if __name__ == "__main__":
    main()
