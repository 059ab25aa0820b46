"""The block manager against a naive one of Python objects, in one run: ``python -m tests.bench.manager``.

Thread CPU time, as the wall clock of a shared machine says little: medians of single calls, and the middle half of
them. Both do the same work on the same tokens: block tables, slot mappings and SHA-256 of full blocks included.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pagemgr.manager import BlockManager
from pagemgr.sequences import Batch
from tests.bench.naive import NaiveManager

SIZE = 16
CONTEXT = 1000
RNG = np.random.default_rng(0)

Timings = list[float]


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of thread CPU time, and what the call returned."""
    start = time.thread_time_ns()
    result = call()
    return (time.thread_time_ns() - start) / 1e3, result


def tokens(count: int) -> np.ndarray:
    return RNG.integers(0, 32_000, count).astype(np.int32)


def manager(num_blocks: int, compiled: bool = True, max_seq_len: int = 40_000) -> BlockManager:
    longest = min(max_seq_len, (num_blocks - 1) * SIZE)
    return BlockManager(num_blocks, SIZE, max_sequences=1100, max_seq_len=longest, compiled=compiled)


def decode(num_seqs: int, compiled: bool = True, repeats: int = 48, num_blocks: int | None = None) -> Timings:
    """Reserve and commit one token for each sequence; block boundaries are staggered."""
    ours = manager(num_blocks or num_seqs * (CONTEXT // SIZE + 8), compiled)
    sequences = ours.add_many([()] * num_seqs)
    ours.commit(ours.reserve(sequences, [tokens(CONTEXT + i % SIZE) for i in range(num_seqs)]))
    batch, times = Batch(sequences), []
    for _ in range(repeats):
        ids = tokens(num_seqs).reshape(-1, 1)
        reserved, plan = clock(lambda ids=ids: ours.reserve(batch, ids))
        committed, _ = clock(lambda plan=plan: ours.commit(plan))
        times.append(reserved + committed)
    return times


def decode_naive(num_seqs: int, repeats: int = 10) -> Timings:
    naive = NaiveManager(num_seqs * (CONTEXT // SIZE + 8), SIZE)
    rows = [naive.add([])[0] for _ in range(num_seqs)]
    naive.step(rows, [tokens(CONTEXT + i % SIZE).tolist() for i in range(num_seqs)])
    return [clock(lambda: naive.step(rows, tokens(num_seqs).reshape(-1, 1).tolist()))[0] for _ in range(repeats)]


def admit(length: int, hit: float, repeats: int = 20, full: bool = False) -> tuple[Timings, Timings]:
    """Add, reserve and commit a prompt of which a share is cached; ``full`` makes every new block an eviction."""
    blocks = length // SIZE + 2
    ours, naive = manager(blocks if full else 40 * blocks), NaiveManager(blocks if full else 40 * blocks, SIZE)
    shared = tokens(int(length * hit))
    times: tuple[Timings, Timings] = ([], [])
    for i in range(repeats + 1):
        prompt = np.concatenate([shared, tokens(length - len(shared))])
        took, sequence = clock(lambda prompt=prompt: _admit(ours, prompt))
        as_list = prompt.tolist()
        took_naive, row = clock(lambda as_list=as_list: _admit_naive(naive, as_list))
        ours.free([sequence])
        naive.free(row)
        if i:  # the first fills the cache
            times[0].append(took)
            times[1].append(took_naive)
    return times


def _admit(ours: BlockManager, prompt: np.ndarray) -> Any:
    sequence = ours.add(prompt)
    ours.commit(ours.reserve([sequence], [prompt[sequence.num_cached_tokens :]]))
    return sequence


def _admit_naive(naive: NaiveManager, prompt: list[int]) -> Any:
    row, hit = naive.add(prompt)
    naive.step([row], [prompt[hit:]])
    return row


def verbs(repeats: int = 40) -> Iterator[tuple[str, Timings, Timings]]:
    """Fork to 4, truncate by half, free, and planning a swap, of a sequence of 4,096 tokens."""
    ours, naive = BlockManager(4000, SIZE, num_host_blocks=4000), NaiveManager(4000, SIZE)
    found: dict[str, tuple[Timings, Timings]] = {
        name: ([], []) for name in ("fork to 4", "truncate", "free", "swap out")
    }
    for _ in range(repeats):
        prompt = tokens(4096)
        sequence, row = _admit(ours, prompt), _admit_naive(naive, prompt.tolist())
        took, children = clock(lambda sequence=sequence: ours.fork(sequence, 4))
        took_naive, rows = clock(lambda row=row: naive.fork(row, 4))
        found["fork to 4"][0].append(took)
        found["fork to 4"][1].append(took_naive)
        took, transfer = clock(lambda sequence=sequence: ours.swap_out([sequence]))
        found["swap out"][0].append(took)
        ours.cancel(transfer)
        found["truncate"][0].append(clock(lambda one=children[0]: ours.truncate([one], [2048]))[0])
        found["truncate"][1].append(clock(lambda one=rows[0]: naive.truncate(one, 2048))[0])
        ours.free(children)
        for child in rows:
            naive.free(child)
        found["free"][0].append(clock(lambda sequence=sequence: ours.free([sequence]))[0])
        found["free"][1].append(clock(lambda row=row: naive.free(row))[0])
    yield from ((name, *both) for name, both in found.items())


def build(num_blocks: int) -> tuple[float, float, float]:
    """Seconds to make a pool, and its bytes a block when empty and when every block is cached."""
    took, ours = clock(lambda: BlockManager(num_blocks, SIZE))
    device = ours.tiers[0]
    pool = sum(a.nbytes for a in vars(device.pool).values() if isinstance(a, np.ndarray))
    policy = sum(a.nbytes for a in vars(device.pool.policy).values() if isinstance(a, np.ndarray))
    index = sum(a.nbytes for a in vars(device.index).values() if isinstance(a, np.ndarray))
    return took / 1e6, (pool + policy) / num_blocks, (pool + policy + index) / num_blocks


def middle(times: Timings) -> dict[str, float]:
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": round(float(median), 1), "low": round(float(low), 1), "high": round(float(high), 1)}


def measure() -> dict[str, Any]:
    """All figures, by name: ``ours`` and ``naive`` in microseconds, ``numpy`` for ours without the compiled loops."""
    rows: dict[str, dict[str, Any]] = {}
    for n in (1, 16, 64, 256, 1024):
        rows[f"decode step, {n} sequences"] = {
            "ours": middle(decode(n)),
            "numpy": middle(decode(n, compiled=False)),
            "naive": middle(decode_naive(n)),
        }
    for length in (512, 4096, 32_768):
        for hit in (0.0, 0.5, 1.0):
            ours, naive = admit(length, hit, repeats=20 if length < 10_000 else 6)
            rows[f"admit {length} tokens, {hit:.0%} hit"] = {"ours": middle(ours), "naive": middle(naive)}
    ours, naive = admit(4096, 0.0, full=True)
    rows["admit 4096 tokens, all evicting"] = {"ours": middle(ours), "naive": middle(naive)}
    for name, ours, naive in verbs():
        rows[name] = {"ours": middle(ours)} | ({"naive": middle(naive)} if naive else {})
    growth = {
        "decode step of 64 by blocks in the pool": {
            n: middle(decode(64, num_blocks=n)) for n in (6000, 100_000, 1_000_000)
        },
        "add of a cached prefix by its tokens": {n: middle(admit(n, 1.0)[0]) for n in (512, 2048, 8192, 32_768)},
    }
    seconds, empty, cached = build(1_000_000)
    return {
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "rows": rows,
        "growth": growth,
        "one million blocks": {
            "seconds": seconds,
            "bytes a block, bookkeeping": empty,
            "and names and token ids": cached,
        },
    }


def show(found: dict[str, Any]) -> None:
    print(found["machine"])
    columns = f"{'pagemgr':>9}{'(middle half)':>18}{'numpy only':>12}{'naive':>11}{'naive / pagemgr':>17}"
    print(f"{'thread CPU time, us':36}{columns}")
    for name, row in found["rows"].items():
        ours, naive = row["ours"], row.get("naive")
        spread = f"({ours['low']:.0f} to {ours['high']:.0f})"
        only = f"{row['numpy']['median']:.0f}" if "numpy" in row else ""
        other = f"{naive['median']:11.0f}{naive['median'] / ours['median']:16.1f}x" if naive else ""
        print(f"{name:36}{ours['median']:9.1f}{spread:>18}{only:>12}{other}")
    for name, points in found["growth"].items():
        print(f"{name}: " + ", ".join(f"{n:,}: {one['median']:.0f} us" for n, one in points.items()))
    print(
        "one million blocks: " + ", ".join(f"{name} {value:.3g}" for name, value in found["one million blocks"].items())
    )


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, 2), found["growth"].items(), strict=True):
        axis.plot(list(points), [one["median"] for one in points.values()], marker="o")
        axis.set(xscale="log", ylim=0, title=name, ylabel="thread CPU time, us")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--picture", type=Path, help="draw how cost grows here")
    arguments = parser.parse_args()
    found = measure()
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
