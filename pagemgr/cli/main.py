"""The root of the command line: which commands there are, and how a failure looks."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import IO, Any

import click

import pagemgr
from pagemgr.errors import OperatingError, UsageError
from pagemgr.logs import JsonFormatter, TextFormatter

COMMANDS = {
    "demo": "A chat-like workload through the real cache, and a picture of its memory.",
    "generate": "Generate text with a model whose K/V cache is pagemgr's.",
    "replay": "Replay a trace of requests, or the log of a manager's calls.",
    "fuzz": "Call the block manager at random and compare what it does with what it should.",
    "config": "Show, describe or check the settings.",
    "build": "Compile the kernels for this machine before their first use.",
    "dashboard": "Print the Grafana dashboard, or write all that Prometheus and Grafana need.",
    "alerts": "Print the recording and alert rules for Prometheus.",
    "serve": "A pool with a workload, to look at: a page, a JSON API, metrics and health.",
    "top": "A running pool in the terminal, live.",
    "plan": "How large a pool a model needs, and which knob to turn.",
    "bench": "How fast the manager and the backends are on this machine.",
    "inspect": "What is in the dump of a pool, and what is wrong with it.",
    "doctor": "What can run on this machine, and what to do about the rest.",
}
"""Name → summary. ``pagemgr.cli.<name>.command`` is imported only when it runs: the list must not wait for torch."""


class Refused(click.ClickException):
    """A failure that the user can act on: one message on stderr and exit code 2, no traceback."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        text = self.message.replace("\n", "\n       ")
        click.echo(f"error: {text}", file=file, err=True)


class LazyGroup(click.Group):
    """A group that lists its commands without importing them, and turns pagemgr's errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"pagemgr.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from their summaries alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what a user can act on becomes a message, and a bug keeps its traceback."""
        try:
            return super().invoke(ctx)
        except (OperatingError, UsageError) as error:
            raise Refused(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pagemgr.__version__, prog_name="pagemgr")
@click.option("-v", "--verbose", count=True, help="Log to stderr what pagemgr does; twice for the details.")
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="How -v logs: for people, or an object a line.",
)
def main(verbose: int, log_format: str) -> None:
    """The memory manager that an LLM inference engine embeds for its KV cache."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger = logging.getLogger("pagemgr" if verbose else "pagemgr.native")  # a build takes a while: say it
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    click.get_current_context().call_on_close(lambda: logger.removeHandler(handler))
