"""``pagemgr fuzz``: random calls of the block manager, and whether it does as it should."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import track

from pagemgr.fuzz.search import KINDS, Disagreement, Outcome, fuzz

from .output import counted, print_table


@click.command("fuzz")
@click.option("--kind", type=click.Choice(tuple(KINDS)), help="By what it is judged; by both in turn unless given.")
@click.option("--seed", type=click.IntRange(min=0), help="Where it starts from; printed. Random unless given.")
@click.option("--steps", type=click.IntRange(min=1), default=10_000, show_default=True, help="Calls to make.")
@click.option(
    "--check-every",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Calls between comparisons of everything; what a call gives is compared at once.",
)
@click.pass_context
def command(ctx: click.Context, kind: str | None, seed: int | None, steps: int, check_every: int) -> None:
    """Call the block manager at random and compare what it does with what it should.

    Kind "model": beside a naive model of one pool and a host to swap to, which says what every call must come to,
    wrong calls included. Kind "bytes": with layer groups and host caches, by whether every sequence reads what it
    wrote. Sizes and calls all come from the seed. In the end every sequence is freed, and every block has to be free or
    cached again. At the first disagreement the exit code is 1, and the last line repeats it.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    kinds = tuple(KINDS) if kind is None else (kind,)
    for one in kinds:
        share = -(-steps // len(kinds))
        progress = track(range(1, share + 1), f"fuzzing ({one})", console=Console(stderr=True), transient=True)
        try:
            outcome = fuzz(one, seed, progress, check_every)
        except Disagreement as error:
            click.echo(f"{error}\nto repeat it: {_line(one, seed, max(error.step, 1), 1)}", err=True)
            ctx.exit(1)
        print_table(_line(one, seed, share, check_every), ("what", "figure"), _rows(outcome))


def _line(kind: str, seed: int, steps: int, check_every: int) -> str:
    return f"pagemgr fuzz --kind {kind} --seed {seed} --steps {steps} --check-every {check_every}"


def _rows(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "manager", ", ".join(f"{name}={value}" for name, value in outcome.sizes.items())
    yield "calls", counted(outcome.verbs)
    yield "refused as they have to be", counted(outcome.refused)
    yield "evicted blocks", f"{outcome.evicted:,}"
    yield "in the end", "every block is free or cached again"
    yield "digest", outcome.digest
