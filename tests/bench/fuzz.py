"""Random shapes against the reference backend, for as long as one likes.

    python -m tests.bench.fuzz --backend cpu --minutes 10
    python -m tests.bench.fuzz --backend cuda --device cuda --minutes 10
    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python -m tests.bench.fuzz --sanitize

``--sanitize`` builds the cpu library with the address and undefined-behaviour sanitizers, ``--variant`` without the
instruction sets after that one; both run the conformance suite on it first. Every case has a seed of its own, which
is printed when it fails, and ``--seed`` begins with it.
"""

from __future__ import annotations

import time

import click
import torch

from pagemgr.backends import AttentionParams, Backend, Capabilities, KVLayer, create
from pagemgr.backends.cases import Case, Problem, build
from pagemgr.backends.conformance import LSE_TOLERANCE, TOLERANCE, checks
from pagemgr.backends.interface import LARGEST
from pagemgr.backends.native import NativeBackend
from pagemgr.backends.reference import TorchBackend
from pagemgr.batch import PagedBatch
from pagemgr.layout import BlockLayout, DType
from pagemgr.native.build import CPU_VARIANTS, DEFAULT_CACHE_DIR, cpu_recipe
from pagemgr.native.build import build as build_library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")


def random_case(generator: torch.Generator, declared: Capabilities) -> Case:
    """Any declared shape, with any features."""

    def pick(*values: object) -> object:
        return values[int(torch.randint(len(values), (), generator=generator))]

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def within(numbers: frozenset[int] | None, otherwise: int) -> int:
        return otherwise if numbers is None else int(pick(*sorted(numbers)))

    size = whole(1, 40) if whole(0, 1) else int(pick(8, 16, 32, 64))
    longest = int(pick(3, 40, 150, 700))
    seqs = []
    for _ in range(whole(0, 6)):
        length = whole(0, longest)
        new = int(pick(1, 1, 1, length, whole(0, length)))
        seqs.append((length, new if length else whole(0, 2)))
    head_dim = within(declared.head_dims, int(pick(64, 128, 8 * whole(1, 34), whole(1, 130))))
    quantised = [kind for kind in LARGEST if kind in declared.kv_dtypes]
    return Case(
        dtype=pick(*sorted(declared.dtypes, key=str)),
        kv_dtype=None if head_dim % 2 else pick(None, None, *quantised),
        head_dim=head_dim,
        block_size=within(declared.block_sizes, size),
        group_size=within(declared.group_sizes, int(pick(1, 2, 4, 8, whole(1, 17)))),
        kv_heads=whole(1, 4),
        seqs=tuple(seqs),
        padding=whole(0, 3),
        causal=bool(whole(0, 3)),
        window=whole(1, longest) if whole(0, 3) == 0 else None,
        softcap=float(pick(None, None, 0.5, 20.0) or 0) or None,
        scale=pick(None, None, 0.3),
        alibi=whole(0, 3) == 0,
        sinks=whole(0, 3) == 0,
        with_lse=bool(whole(0, 1)),
        poison=float(pick(torch.nan, torch.inf)),
    )


def compare(backend: Backend, case: Case, generator: torch.Generator, device: str) -> None:
    """Raise ``AssertionError`` if the backend and the reference differ."""
    problem = build(case, generator, device)
    args = (problem.query, problem.kv, problem.batch, problem.params)
    lses = [torch.full(problem.query.shape[:2], torch.nan, device=device) if case.with_lse else None for _ in range(2)]
    out = backend.attention(*args, lse=lses[0])
    exact = in_float64(problem) if case.dtype is torch.float32 else args
    expected = TorchBackend().attention(*exact, lse=lses[1])
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)
    if case.with_lse:
        tolerance = LSE_TOLERANCE[case.dtype]
        torch.testing.assert_close(lses[0], lses[1], atol=tolerance, rtol=tolerance)


def in_float64(problem: Problem) -> tuple[torch.Tensor, KVLayer, PagedBatch, AttentionParams]:
    """The arguments of ``attention``, with the same values."""
    kv = problem.kv if problem.kv.key_scale is not None else KVLayer(problem.kv.key.double(), problem.kv.value.double())
    return problem.query.double(), kv, problem.batch, problem.params


@click.command()
@click.option("--backend", "name", default="cpu", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--minutes", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the first case; the next has the next.")
@click.option("--threads", default=1, show_default=True)
@click.option("--sanitize", is_flag=True, help="The cpu library, with sanitizers.")
@click.option("--variant", type=click.Choice(tuple(CPU_VARIANTS)), help="The cpu library, for this instruction set.")
def main(name: str, device: str, minutes: float, seed: int, threads: int, sanitize: bool, variant: str | None) -> None:
    """Compare a backend with the reference on random shapes."""
    torch.set_num_threads(threads)
    if sanitize or variant is not None:
        names = list(CPU_VARIANTS)
        known = None if variant is None else names[: names.index(variant) + 1]
        made_by = cpu_recipe(known, SANITIZERS if sanitize else ())
        backend = NativeBackend.at(build_library(made_by, DEFAULT_CACHE_DIR))()
        found = checks(backend, "cpu")
        for check in found:
            check.run()
        click.echo(f"{len(found)} checks of the conformance suite pass on {backend.library.variant}")
    else:
        dtype = DType.float32 if device == "cpu" else DType.float16
        layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=64, block_size=16, dtype=dtype)
        backend = create(name, layout, 1, device)
    deadline, first = time.monotonic() + 60 * minutes, seed
    while time.monotonic() < deadline:
        generator = torch.Generator().manual_seed(seed)
        case = random_case(generator, backend.capabilities())
        try:
            compare(backend, case, generator, device)
        except AssertionError as error:
            raise click.ClickException(f"seed {seed}: {case}\n{error}") from error
        seed += 1
    click.echo(f"{seed - first} random cases agree")


if __name__ == "__main__":
    main()
