"""Command line flags made from the config tree: one for each setting, and ``--config`` for a file.

A command takes the settings by decoration, and receives them loaded:

    @click.command()
    @config_options
    def command(config: Config) -> None: ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from pagemgr.config import Config, Loaded, load
from pagemgr.sources import flag, leaves

Command = Callable[..., Any]


def config_options(function: Command) -> Command:
    """Add the flags, and pass ``config: Config`` to the function."""

    @functools.wraps(function)
    def with_config(*args: Any, loaded: Loaded, **kwargs: Any) -> Any:
        return function(*args, config=loaded.config, **kwargs)

    return loaded_options(with_config)


def loaded_options(function: Command) -> Command:
    """Add the flags, and pass ``loaded: Loaded``, the config with the origin of every value, to the function."""

    @functools.wraps(function)
    def with_loaded(*args: Any, config_file: str | None, overrides: dict[str, object], **kwargs: Any) -> Any:
        return function(*args, loaded=load(config_file, overrides), **kwargs)

    return setting_options(with_loaded)


def setting_options(function: Command) -> Command:
    """Add the flags, and pass ``config_file`` and ``overrides``, what ``load`` takes, to the function."""
    keys = {key.replace(".", "__"): key for key, _ in leaves(Config)}

    @functools.wraps(function)
    def with_settings(*args: Any, **kwargs: Any) -> Any:
        given = {key: kwargs.pop(parameter) for parameter, key in keys.items()}
        overrides = {key: value for key, value in given.items() if value is not None}
        return function(*args, overrides=overrides, **kwargs)

    command: Command = with_settings
    for key, field in reversed(list(leaves(Config))):
        # Text goes to the config as it was typed: one place converts and refuses it, whatever the source.
        default = None if field.is_required() or field.default in (None, PydanticUndefined) else field.default
        command = click.option(
            flag(key),
            key.replace(".", "__"),
            metavar=_metavar(field.annotation),
            help=field.description if default is None else f"{field.description}  [default: {_text(default)}]",
        )(command)
    file = click.option("--config", "config_file", metavar="FILE", help="TOML file with settings; flags beat it.")
    return file(command)


def _metavar(annotation: Any) -> str:
    """What to type, from the type: ``int | None`` is INT, an enum is its values."""
    types = _types(annotation)
    if enums := [kind for kind in types if issubclass(kind, Enum)]:
        return "|".join(_text(member) for member in enums[0])
    return {(bool,): "true|false", (int,): "INT", (float,): "FLOAT", (int, str): "BYTES"}.get(types, "TEXT")


def _types(annotation: Any) -> tuple[type, ...]:
    if isinstance(annotation, type):
        return () if annotation is type(None) else (annotation,)
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _types(parts[0])
    return tuple(kind for part in parts for kind in _types(part))


def _text(value: object) -> str:
    """A value as it would be typed."""
    text = str(value.value if isinstance(value, Enum) else value)
    return text.lower() if isinstance(value, bool) else text
