"""``pagemgr inspect``: what is in a dump, where its bytes are, and what is wrong with it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import click

from pagemgr.dump import Dump, from_document, problems
from pagemgr.errors import InvalidInput
from pagemgr.metrics import bytes_by_cause
from pagemgr.service.summary import health, largest_sequences, num_sequences, shared_prefixes

from .output import print_json, print_table


@click.command("inspect")
@click.argument("dump", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1), help="Sequences and prefixes to list.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(ctx: click.Context, dump: Path, limit: int, as_json: bool) -> None:
    """Verify DUMP, the state of a pool as JSON (gzipped or not), and say where its bytes are.

    \b
    curl -X POST -H "Authorization: Bearer $TOKEN" http://127.0.0.1:8620/api/v1/dump > dump.json
    pagemgr inspect dump.json

    In Python: json.dump(pagemgr.dump.to_document(pagemgr.dump.take(manager)), file). It holds no token ids, no names of
    prefixes and no tenants. Exit code 1 if the pool broke a law that its manager is to keep.
    """
    pool = from_document(_read(dump))
    found = problems(pool)
    tiers = [_tier(pool, index) for index in range(len(pool.stats.tiers))]
    largest, prefixes = largest_sequences(pool, limit), shared_prefixes(pool, limit)
    if as_json:
        print_json({"problems": found, "tiers": tiers, "largest": largest, "prefixes": prefixes})
    else:
        unit = "bytes" if pool.block_bytes else "slots"
        columns = tuple(dict.fromkeys(name for tier in tiers for name in tier))  # a tier has causes of its own
        print_table(
            f"where the {unit} are", columns, [[_grouped(tier.get(name)) for name in columns] for tier in tiers]
        )
        click.echo()
        _list(f"largest of {num_sequences(pool)} sequences", largest)
        _list("shared prefixes", prefixes)
        for problem in found:
            click.echo(f"problem: {problem}", err=True)
        click.echo(
            f"{len(found)} problems: a bug in pagemgr, please report it with this file" if found else "no problem found"
        )
    ctx.exit(1 if found else 0)


def _read(path: Path) -> object:
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no JSON: {error}; make a dump as in pagemgr inspect --help") from None


def _tier(pool: Dump, index: int) -> dict[str, Any]:
    tier = pool.stats.tiers[index]
    return {
        "tier": tier.name,
        "is": health(tier),
        "blocks": tier.num_blocks,
        **bytes_by_cause(tier, pool.block_bytes or pool.block_size),
        "saved": tier.saved * (pool.block_bytes or pool.block_size),
    }


def _list(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        columns = tuple(name.replace("_", " ") for name in rows[0])
        print_table(title, columns, [tuple(map(_grouped, row.values())) for row in rows])
    else:
        click.echo(f"{title}: none")
    click.echo()


def _grouped(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None if value is None else str(value)
