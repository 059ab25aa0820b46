"""What came of the calls in a manager's log, as ``pagemgr replay`` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click
from click.core import ParameterSource

from pagemgr.recording import LogReplay, replay_log

from .output import counted, print_json, print_table


def print_log(ctx: click.Context, path: str, as_json: bool) -> None:
    """Make the calls again, print what came of them, and exit with 1 if that is not what the log says.

    Raises ``click.UsageError`` for options that only a trace has.
    """
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in ("trace", "as_json"):
            raise click.UsageError(f"{parameter.opts[0]} is for traces: {path} is a log, which says it all", ctx)
    found = replay_log(path)
    if as_json:
        print_json({"log": path, **asdict(found), "reproduced": found.difference is None})
    else:
        print_table(path, ("what", "figure"), _rows(found))
        click.echo()
        click.echo("reproduced" if found.difference is None else f"first difference: {found.difference}")
    if found.difference is not None:
        ctx.exit(1)


def _rows(found: LogReplay) -> Iterator[tuple[str, str]]:
    yield "manager", ", ".join(f"{name}={value}" for name, value in found.manager.items() if value is not None)
    yield "calls", counted(found.calls)
    yield "failures", counted(found.failures)
    usable = found.manager["num_blocks"] - 1
    yield "peak use", f"{found.peak_used:,} of {usable:,} blocks ({found.peak_used / usable:.1%})"
    if found.is_cut:
        yield "last line", "cut: passed over"
