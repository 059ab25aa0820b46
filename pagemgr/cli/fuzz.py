"""``pagemgr fuzz``: random calls of the block manager beside a naive model of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import track

from pagemgr.fuzz.driver import Disagreement, Outcome, fuzz

from .output import counted, print_table


@click.command("fuzz")
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
def command(ctx: click.Context, seed: int | None, steps: int, check_every: int) -> None:
    """Call the block manager at random beside a naive model of what it promises.

    Sizes, calls and wrong calls all come from the seed. In the end every sequence is freed, and every block has to be
    free or cached again. At the first disagreement the exit code is 1, and the last line repeats it.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    progress = track(range(1, steps + 1), description="fuzzing", console=Console(stderr=True), transient=True)
    try:
        outcome = fuzz(seed, progress, check_every)
    except Disagreement as error:
        click.echo(f"{error}\nto repeat it: {_line(seed, max(error.step, 1), 1)}", err=True)
        ctx.exit(1)
    print_table(_line(seed, steps, check_every), ("what", "figure"), _rows(outcome))


def _line(seed: int, steps: int, check_every: int) -> str:
    return f"pagemgr fuzz --seed {seed} --steps {steps} --check-every {check_every}"


def _rows(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "manager", ", ".join(f"{name}={value}" for name, value in asdict(outcome.sizes).items())
    yield "calls", counted(outcome.verbs)
    yield "refused as they have to be", counted(outcome.refused)
    yield "evicted blocks", f"{outcome.evicted:,}"
    yield "in the end", "every block is free or cached again"
    yield "digest", outcome.digest
