"""``pagemgr dashboard``: the Grafana dashboard, or all that Prometheus and Grafana need to show a pool."""

from __future__ import annotations

from pathlib import Path

import click

from pagemgr.metrics.shipped import dashboard_json, write_stack


@click.command("dashboard")
@click.option(
    "--stack",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write scrape config, rules, dashboard and a compose file into this new folder instead.",
)
def command(stack: Path | None) -> None:
    """Print the Grafana dashboard as JSON: import it, and choose your Prometheus as its data source.

    \b
    pagemgr dashboard > pagemgr.json
    pagemgr dashboard --stack monitoring && docker compose -f monitoring/compose.yaml up
    """
    if stack is None:
        click.echo(dashboard_json(), nl=False)
        return
    for path in write_stack(stack):
        click.echo(path)
    click.echo(f"docker compose -f {stack}/compose.yaml up starts both; Grafana is then on http://127.0.0.1:3000")
