"""``pagemgr top``: a running pool in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pagemgr.config import ServiceConfig

from .client import Client
from .output import amount, console, print_json

DOCUMENTS = ("stats", "tiers", "sequences")
EVERY = 1.0
BAR = 50
ROWS = 12
STATES = (("full", "█", "blue"), ("open", "▓", "yellow"), ("cached", "▒", "green"), ("fenced", "!", "magenta"))
"""What a tier's bar is made of, the rest being free."""

Documents = dict[str, Any]


@click.command("top")
@click.argument("url", default=f"http://127.0.0.1:{ServiceConfig().port}")
@click.option("--once", is_flag=True, help="Print the state once, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and stop.")
def command(url: str, once: bool, as_json: bool) -> None:
    """A running pool, live: memory by tier, hits, pressure, and the largest sequences. Ctrl-C ends it.

    \b
    pagemgr top                                  the pool that pagemgr serve serves here
    pagemgr top http://127.0.0.1:9000/kv         one that an engine serves
    pagemgr top --once --json | jq .stats.utilization
    """
    client = Client(url)
    now = client.ask(*DOCUMENTS)
    if as_json:
        print_json(now)
    elif once:
        console().print(view(client.url, now, None))
    else:
        _follow(client, now)


def _follow(client: Client, now: Documents) -> None:
    with Live(view(client.url, now, None), console=console(), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(EVERY)
                before, now = now, client.ask(*DOCUMENTS)
                live.update(view(client.url, now, before), refresh=True)
        except KeyboardInterrupt:
            return


def view(url: str, now: Documents, before: Documents | None) -> RenderableType:
    """All of it; with an earlier state, rates as well."""
    stats = now["stats"]
    title = Text.assemble(
        ("pagemgr ", "bold"),
        f"{stats['pool']} at {url}   {stats['backend']} on {stats['device']}, evicts by {stats['eviction']}",
    )
    legend = Text.assemble(*((f"{sign} {name}  ", style) for name, sign, style in STATES), ("· free", "dim"))
    return Group(title, "", *map(_bar, now["tiers"]["tiers"]), legend, "", _figures(now, before), "", _largest(now))


def _bar(tier: dict[str, Any]) -> Text:
    usable = tier["num_blocks"] - tier["null"]
    bar, filled, held = Text(f"{tier['name']:<8}"), 0, 0
    for name, sign, style in STATES:
        held += tier[name]
        cells = round(BAR * held / usable) - filled
        bar.append(sign * cells, style)
        filled += cells
    bar.append("·" * (BAR - filled), "dim")
    used = f"{tier['utilization']:>7.1%} of {amount(tier['capacity_bytes'])}"
    return bar.append(f" {used}, {tier['sequences']} sequences, {tier['health']}")


def _figures(now: Documents, before: Documents | None) -> Table:
    table = Table("", "since the start", "a second", box=box.SIMPLE_HEAD, pad_edge=False)
    seconds = now["stats"]["time"] - before["stats"]["time"] if before else 0
    earlier = dict(_counts(before)) if before else {}
    for name, value in _counts(now):
        shown = amount if name.startswith("bytes") else "{:,.0f}".format
        rate = shown((value - earlier[name]) / seconds) if seconds > 0 else "-"
        table.add_row(name, shown(value), rate)
    hits = f"{now['stats']['hit_ratio']:.1%}"
    table.add_row("prefix hits", hits, f"{_recent_hits(now, before):.1%}" if before else "-")
    return table


def _counts(documents: Documents) -> Iterator[tuple[str, int]]:
    counters, block = documents["stats"]["counters"], documents["stats"]["block_bytes"]
    yield "steps", counters["steps_committed"]
    yield "tokens", counters["tokens_committed"]
    yield "blocks evicted", sum(tier["evicted_total"] for tier in documents["tiers"]["tiers"])
    yield "calls refused", sum(counters["failures"].values())
    yield "bytes swapped", sum(counters["swapped_blocks"].values()) * block
    yield "checks failed", counters["invariant_violations"]


def _recent_hits(now: Documents, before: Documents) -> float:
    """Share of the tokens asked for since ``before`` that were cached; 0 if none were asked for."""
    asked, hit = (
        now["stats"]["counters"][name] - before["stats"]["counters"][name]
        for name in ("prefix_query_tokens", "prefix_hit_tokens")
    )
    return hit / asked if asked else 0.0


def _largest(now: Documents) -> Table:
    found = now["sequences"]
    table = Table(
        "row", "tier", "doing", "tokens", "blocks", "shared", "bytes", box=box.SIMPLE_HEAD, pad_edge=False,
        title=f"largest of {found['total']} sequences", title_justify="left",
    )  # fmt: skip
    for one in found["largest"][:ROWS]:
        cells = [one["row"], one["tier"], one["doing"], f"{one['tokens']:,}", one["blocks"], one["shared_blocks"]]
        table.add_row(*map(str, cells), amount(one["bytes"]))
    return table
