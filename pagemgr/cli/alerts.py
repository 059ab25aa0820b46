"""``pagemgr alerts``: the recording and alert rules."""

from __future__ import annotations

import click

from pagemgr.metrics.shipped import rules_yaml


@click.command("alerts")
def command() -> None:
    """Print the recording and alert rules for Prometheus, whose rule_files should name them.

    \b
    pagemgr alerts > /etc/prometheus/rules/pagemgr.yaml
    """
    click.echo(rules_yaml(), nl=False)
