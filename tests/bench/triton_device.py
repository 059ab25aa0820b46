"""The Triton backend on a GPU, beside ceilings of the same run: ``python -m tests.bench.triton_device --json out``.

Medians of graph replays between events, L2 flushed before each; blocks shuffled over a pool as large as the data. Every
timed shape is compared with the torch backend first. Where FlashAttention-3 is installed as ``fa3_fwd_interface``, its
paged prefill (TMA, pages of 128 tokens) is timed as well; cuDNN through torch's SDPA reads contiguous K and V.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagemgr.backends import AttentionParams, KVLayer
from pagemgr.backends.reference import TorchBackend
from pagemgr.backends.triton.backend import TritonBackend
from pagemgr.batch import PagedBatch

PARAMS = AttentionParams()
DTYPE = torch.bfloat16
FLUSHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """A batch: ``lens`` tokens in the cache, of which the last ``news`` are queries."""

    heads: int
    kv_heads: int
    lens: tuple[int, ...]
    news: tuple[int, ...]
    dim: int = 128
    size: int = 16
    note: str = ""

    def __str__(self) -> str:
        what = self.note or f"{len(self.lens)} x {self.news[0]} of {self.lens[0]}"
        return f"{self.heads}/{self.kv_heads} d{self.dim} b{self.size} {what}"

    @property
    def kv_bytes(self) -> int:
        return 4 * self.dim * self.kv_heads * sum(self.lens)

    @property
    def flops(self) -> float:
        pairs = sum(new * (n - new) + new * (new + 1) / 2 for n, new in zip(self.lens, self.news, strict=True))
        return 4 * self.heads * self.dim * pairs


def decode_shape(heads: int, kv_heads: int, batch: int, context: int, **more: Any) -> Shape:
    return Shape(heads, kv_heads, (context,) * batch, (1,) * batch, **more)


def ragged_shape(heads: int, kv_heads: int, batch: int, mean: int, **more: Any) -> Shape:
    """Lengths with the long tail that served prompts have."""
    draw = torch.empty(batch).log_normal_(0, 1, generator=torch.Generator().manual_seed(batch)) * mean / 1.65
    lens = tuple(draw.int().clamp(1, 32768).tolist())
    return Shape(heads, kv_heads, lens, (1,) * batch, note=f"{batch} ragged, mean {sum(lens) // batch}", **more)


# The best paged peer that was measured on an H100, GB/s.
DECODE_PEERS = {
    decode_shape(heads, kv_heads, batch, context): best
    for heads, kv_heads, batch, context, best in (
        (32, 8, 1, 1024, 306), (32, 8, 1, 8192, 1385), (32, 8, 1, 32768, 2237), (32, 8, 16, 1024, 2062),
        (32, 8, 16, 8192, 2840), (32, 8, 16, 32768, 2999), (32, 8, 64, 1024, 2684), (32, 8, 64, 8192, 2987),
        (32, 8, 256, 1024, 2895), (32, 8, 256, 8192, 3063), (64, 8, 1, 8192, 1389), (64, 8, 16, 1024, 2050),
        (64, 8, 64, 8192, 2983), (64, 8, 256, 8192, 3055), (32, 32, 1, 1024, 1079), (32, 32, 1, 8192, 2351),
        (32, 32, 16, 1024, 2764), (32, 32, 64, 8192, 3070),
    )
}  # fmt: skip
DECODE_OTHERS = (
    decode_shape(32, 8, 64, 8192, dim=64), decode_shape(32, 8, 16, 8192, dim=64),
    decode_shape(16, 8, 16, 8192, dim=256), decode_shape(16, 8, 64, 8192, dim=256),
    decode_shape(32, 8, 64, 8192, dim=96), decode_shape(32, 8, 64, 8192, size=32),
    decode_shape(32, 8, 64, 8192, size=64), decode_shape(32, 8, 16, 1024, size=64),
    decode_shape(28, 4, 64, 8192), decode_shape(48, 8, 128, 2048), decode_shape(32, 8, 7, 5000),
    ragged_shape(32, 8, 64, 4096), ragged_shape(32, 8, 256, 1500), ragged_shape(64, 8, 16, 8192),
    Shape(32, 8, (8192,) * 16, (4,) * 16),
)  # fmt: skip
# FlashAttention-3, TFLOP/s, in the run that the peers were measured in.
PREFILL_PEERS = {
    Shape(heads, kv_heads, (context,) * batch, (new,) * batch): best
    for heads, kv_heads, batch, new, context, best in (
        (32, 8, 16, 1024, 1024, 427), (32, 8, 4, 4096, 4096, 658), (32, 8, 1, 16384, 16384, 744),
        (32, 8, 1, 2048, 32768, 743), (32, 8, 8, 512, 8192, 709), (32, 32, 4, 4096, 4096, 645),
    )
}  # fmt: skip
PREFILL_OTHERS = (
    Shape(32, 8, (4096,) * 4, (4096,) * 4, size=64), Shape(32, 8, (4096,) * 4, (4096,) * 4, dim=64),
    Shape(16, 8, (4096,) * 4, (4096,) * 4, dim=256), Shape(28, 4, (4096,) * 4, (4096,) * 4),
    Shape(32, 8, (32768,), (128,)), Shape(32, 8, (8192,) * 34, (512, 512, *(1,) * 32), note="2 x 512 + 32 decodes"),
)  # fmt: skip


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def read_kernel(source, sink, CHUNK: tl.constexpr):
    words = tl.load(source + tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK))
    mixed = tl.reduce(words, 0, _xor)
    if mixed == 1234567:
        tl.store(sink, mixed)


@dataclass
class Bench:
    """Times calls, and keeps what was found."""

    repeats: int
    memory: torch.Tensor
    found: dict[str, Any] = field(default_factory=dict)

    def microseconds(self, call: Callable[[], object], graph: bool = True) -> float:
        """Of one call on the device."""
        call()
        torch.cuda.synchronize()
        run = call
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            run = captured.replay
        flushed = self.memory[: FLUSHED_BYTES // 2].view(torch.float32)
        times = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, stop in times:
            flushed.sum()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in times) * 1e3

    def problem(self, shape: Shape, size: int | None = None) -> tuple[torch.Tensor, KVLayer, PagedBatch]:
        """Random tensors; blocks of ``size`` tokens in place of the shape's, if given."""
        size = size or shape.size
        counts = [-(-n // size) for n in shape.lens]
        blocks = sum(counts) + 1
        words = 2 * shape.kv_heads * size * shape.dim
        pool = self.memory[: blocks * words].view(blocks, 2, shape.kv_heads, size, shape.dim)
        ids = 1 + torch.randperm(blocks - 1, device="cuda", dtype=torch.int32)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cuda")
        for row, part in enumerate(torch.split(ids, counts)):
            table[row, : len(part)] = part
        starts = [0, *itertools.accumulate(shape.news)]
        batch = PagedBatch(
            block_table=table,
            seq_lens=torch.tensor(shape.lens, dtype=torch.int32, device="cuda"),
            query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            slot_mapping=torch.full((starts[-1],), -1, device="cuda"),
            max_query_len=max(shape.news),
            max_seq_len=max(shape.lens),
        )
        query = torch.randn(starts[-1], shape.heads, shape.dim, device="cuda", dtype=DTYPE)
        return query, KVLayer(pool[:, 0], pool[:, 1]), batch

    def attention(self, shape: Shape) -> float:
        """Microseconds; the first and the last sequence are compared with the torch backend."""
        query, kv, batch = self.problem(shape)
        out, backend = torch.full_like(query, torch.nan), TritonBackend()
        backend.attention(query, kv, batch, PARAMS, out)
        for row in (0, len(shape.lens) - 1):
            _compare(query, kv, batch, out, row)
        return self.microseconds(lambda: backend.attention(query, kv, batch, PARAMS, out))

    def note(self, table: str, name: object, row: dict[str, Any]) -> None:
        self.found.setdefault(table, {})[str(name)] = row
        print(f"{table:8} {name!s:44}", *(f"{key} {value:<8.5g}" for key, value in row.items()), flush=True)


def _compare(query: torch.Tensor, kv: KVLayer, batch: PagedBatch, out: torch.Tensor, row: int) -> None:
    start, stop = batch.query_start[row : row + 2].tolist()
    start = max(start, stop - 256)
    ids = batch.block_table[row].long()
    exact = KVLayer(kv.key[ids].float(), kv.value[ids].float())
    one = PagedBatch(
        torch.arange(len(ids), device="cuda", dtype=torch.int32)[None],
        batch.seq_lens[row : row + 1],
        torch.tensor([0, stop - start], device="cuda", dtype=torch.int32),
        batch.slot_mapping[start:stop],
        stop - start,
        batch.max_seq_len,
    )
    expected = TorchBackend().attention(query[start:stop].float(), exact, one, PARAMS)
    error = float((out[start:stop].float() - expected).norm() / expected.norm())
    assert error < 6e-3, f"relative error {error}"


def ceilings(bench: Bench) -> float:
    """GB/s of reading; also a one-kernel graph's microseconds."""
    source, sink = bench.memory[: 1 << 31].view(torch.int32), torch.zeros(1, dtype=torch.int32, device="cuda")
    found = 0.0
    for chunk in (8192, 16384):
        took = bench.microseconds(lambda chunk=chunk: read_kernel[(len(source) // chunk,)](source, sink, chunk))
        found = max(found, source.nbytes / took / 1e3)
    empty = bench.microseconds(lambda: sink.fill_(1))
    bench.note("ceiling", "read", {"GB/s": found, "one-kernel graph us": empty})
    return found


def decode(bench: Bench, ceiling: float) -> None:
    for shape in (*DECODE_PEERS, *DECODE_OTHERS):
        took = bench.attention(shape)
        speed = shape.kv_bytes / took / 1e3
        row = {"us": took, "GB/s": speed, "of ceiling": speed / ceiling}
        if shape in DECODE_PEERS:
            row |= {"peer": DECODE_PEERS[shape], "ratio": speed / DECODE_PEERS[shape]}
        bench.note("decode", shape, row)


def prefill(bench: Bench) -> None:
    for shape in (*PREFILL_PEERS, *PREFILL_OTHERS):
        took = bench.attention(shape)
        row = {"us": took, "TFLOP/s": shape.flops / took / 1e6}
        if shape in PREFILL_PEERS:
            row["noted fa3"] = PREFILL_PEERS[shape]
        if (peer := flash_attention(bench, shape)) is not None:
            row |= {"fa3": shape.flops / peer / 1e6, "of fa3": peer / took}
        bench.note("prefill", shape, row)
    for batch, new in ((4, 4096), (1, 16384)):
        query = torch.randn(batch, 32, new, 128, device="cuda", dtype=DTYPE)
        key = torch.randn(batch, 8, new, 128, device="cuda", dtype=DTYPE)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            took = bench.microseconds(
                lambda q=query, k=key: torch.nn.functional.scaled_dot_product_attention(
                    q, k, k, is_causal=True, enable_gqa=True
                ),
                graph=False,
            )
        flops = Shape(32, 8, (new,) * batch, (new,) * batch).flops
        bench.note("prefill", f"cudnn, contiguous, {batch} x {new}", {"us": took, "TFLOP/s": flops / took / 1e6})


def flash_attention(bench: Bench, shape: Shape) -> float | None:
    """Microseconds of FlashAttention-3 on pages of 128 tokens; None where it is missing or cannot."""
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except ImportError:
        return None
    if len(set(shape.news)) > 1:
        return None
    query, kv, batch = bench.problem(shape, size=128)
    query = query.view(len(shape.lens), -1, shape.heads, shape.dim)
    key, value = kv.key.transpose(1, 2), kv.value.transpose(1, 2)
    try:
        return bench.microseconds(
            lambda: flash_attn_with_kvcache(
                query, key, value, cache_seqlens=batch.seq_lens, page_table=batch.block_table, causal=True
            )
        )
    except RuntimeError as error:  # a head dim that it was not built for
        print(f"{shape}: {error}")
        return None


def moving(bench: Bench) -> None:
    """``write_kv`` into shuffled blocks, and ``copy_blocks``."""
    backend = TritonBackend()
    for tokens in (1, 256, 2048, 16384, 65536):
        _, kv, batch = bench.problem(decode_shape(32, 8, 1, tokens))
        slots = (batch.block_table[0][:, None] * 16 + torch.arange(16, device="cuda")).flatten()[:tokens].long()
        new = torch.randn(2, tokens, 8, 128, device="cuda", dtype=DTYPE)
        took = bench.microseconds(lambda n=new, s=slots, kv=kv: backend.write_kv(n[0], n[1], kv, s))
        bench.note("write", f"{tokens} tokens", {"us": took, "GB/s": 2 * new.nbytes / took / 1e3})
    for block_bytes, pairs in ((65536, 16), (65536, 512), (65536, 8192), (2 << 20, 64), (2 << 20, 512)):
        pool = self_sized(bench.memory, block_bytes)
        ids = torch.randperm(len(pool), device="cuda")[: 2 * pairs].view(-1, 2)
        took = bench.microseconds(lambda pool=pool, ids=ids: backend.copy_blocks(pool, pool, ids))
        row = {"us": took, "GB/s": 2 * pairs * block_bytes / took / 1e3}
        bench.note("copy", f"{pairs} blocks of {block_bytes >> 10} KiB", row)


def self_sized(memory: torch.Tensor, block_bytes: int) -> torch.Tensor:
    blocks = memory.nbytes // block_bytes
    return memory[: blocks * block_bytes // 2].view(blocks, -1)


def host(bench: Bench) -> None:
    """Microseconds of the Python call, nothing awaited; and seconds of the first call, compilation included."""
    backend = TritonBackend()
    query, kv, batch = bench.problem(decode_shape(40, 8, 2, 100))
    out, new = torch.empty_like(query), torch.randn(2, 8, 128, device="cuda", dtype=DTYPE)
    start = time.perf_counter()
    backend.attention(query, kv, batch, PARAMS, out)
    torch.cuda.synchronize()
    bench.note("host", "first attention", {"s": time.perf_counter() - start})
    for name, call in (
        ("attention", lambda: backend.attention(query, kv, batch, PARAMS, out)),
        ("write_kv", lambda: backend.write_kv(new, new, kv, batch.slot_mapping)),
    ):
        times = []
        for _ in range(20 * bench.repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        bench.note("host", name, {"us": statistics.median(times) * 1e6})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    memory = torch.empty(4400 << 20, device="cuda", dtype=DTYPE)
    for part in memory.split(1 << 28):
        part.normal_()
    bench = Bench(arguments.repeats, memory)
    bench.found["machine"] = [torch.cuda.get_device_name(), torch.__version__, triton.__version__]
    print(*bench.found["machine"])
    host(bench)
    ceiling = ceilings(bench)
    decode(bench, ceiling)
    moving(bench)
    prefill(bench)
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.found, indent=1))


if __name__ == "__main__":
    main()
