"""How results are printed: tables for people, which a pipe gets plain and unfolded, and JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import click
from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 10_000
"""Columns where there is no terminal: nothing is folded or cut."""


def console() -> Console:
    """On stdout: the terminal's width and colours, or neither in a pipe."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """One row a line; ``None`` is shown as a dash and booleans as in TOML."""
    target = console()
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD if target.is_terminal else None)
    for row in rows:
        table.add_row(*map(_text, row))
    target.print(table)


def print_json(value: object) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2))


def counted(counts: Mapping[str, int]) -> str:
    """The sum, and what it consists of, the most first."""
    parts = ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    )
    return f"{sum(counts.values()):,}" + (f": {parts}" if parts else "")


def amount(count: float) -> str:
    """Bytes as people read them: ``2.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    return "-" if cell is None else str(cell)
