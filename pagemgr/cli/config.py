"""``pagemgr config``: show the settings and where each came from, describe them, or check a file."""

from __future__ import annotations

from collections.abc import Mapping

import click

from pagemgr.config import Config, Loaded, load

from .options import loaded_options
from .output import print_json, print_table


@click.group("config")
def command() -> None:
    """Show, describe or check the settings."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@loaded_options
def show(loaded: Loaded, as_json: bool) -> None:
    """Every setting as it takes effect, and where it came from: a file, a variable, a flag or the default."""
    values = loaded.config.model_dump(mode="json")
    if as_json:
        print_json({"config": values, "origins": dict(loaded.origins)})
    else:
        rows = [(key, _value(values, key), origin) for key, origin in loaded.origins.items()]
        print_table("settings", ("setting", "value", "from"), rows)


@command.command()
def schema() -> None:
    """The settings as a JSON schema."""
    print_json(Config.model_json_schema())


@command.command()
@click.argument("file")
def validate(file: str) -> None:
    """Check that FILE, a TOML file, can work by itself."""
    load(file, environ={})
    click.echo(f"{file}: ok")


def _value(values: Mapping[str, object], key: str) -> object:
    node: object = values
    for name in key.split("."):
        assert isinstance(node, Mapping)  # every key but the last names a section
        node = node[name]
    return node
