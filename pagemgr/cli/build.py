"""``pagemgr build``: compile the kernels ahead of their first use."""

from __future__ import annotations

from pathlib import Path

import click

from pagemgr.config import load_native
from pagemgr.errors import BackendUnavailable
from pagemgr.native.build import TARGETS, build, recipe
from pagemgr.sources import flag

from .output import print_table

CACHE_DIR = "native.cache_dir"


@click.command("build")
@click.argument("target", type=click.Choice(TARGETS), required=False)
@click.option("--config", "config_file", metavar="FILE", help="TOML file with settings; flags beat it.")
@click.option(flag(CACHE_DIR), "cache_dir", metavar="TEXT", help="Folder that keeps the built libraries.")
def command(target: str | None, config_file: str | None, cache_dir: str | None) -> None:
    """Compile the kernels for this machine, and print where the libraries are.

    Without TARGET, everything that this machine has a compiler for.
    """
    settings = load_native(config_file, {} if cache_dir is None else {CACHE_DIR: cache_dir})
    if target is not None:
        click.echo(build(recipe(target), settings.cache_dir))
        return
    rows: list[tuple[str, Path | None, str | None]] = []
    for one in TARGETS:
        try:
            made_by = recipe(one)
        except BackendUnavailable as error:
            rows.append((one, None, error.reason))
        else:
            rows.append((one, build(made_by, settings.cache_dir), None))
    print_table("built", ("target", "library", "if none, why and what to do"), rows)
