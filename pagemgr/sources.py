"""Where settings come from, and what is wrong with them in words. Knows no setting by name.

A source is a flat dict: dotted key → (value, origin), where the origin is what a person would look for: the path of
a file, the name of a variable, or a flag.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from .errors import ConfigError

Source = dict[str, tuple[object, str]]


def from_file(tree: type[BaseModel], path: str | os.PathLike[str] | None) -> Source:
    """A TOML file; ``ConfigError`` with the path, and the line where there is one, if it cannot be read."""
    if path is None:
        return {}
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: {error.strerror}") from None
    except ValueError as error:  # bad TOML, or bytes that are not UTF-8
        raise ConfigError(f"{os.fspath(path)}: not valid TOML: {error}") from None
    return {key: (value, os.fspath(path)) for key, value in _flat(document, _sections(tree))}


def from_environ(environ: Mapping[str, str], prefix: str) -> Source:
    """The variables that start with ``prefix``; two underscores stand for the dot."""
    names = [name for name in environ if name.startswith(prefix)]
    return {name.removeprefix(prefix).lower().replace("__", "."): (environ[name], name) for name in names}


def from_flags(values: Mapping[str, object]) -> Source:
    """Dotted keys, as command line flags set them."""
    return {key: (value, flag(key)) for key, value in values.items()}


def flag(key: str) -> str:
    """The command line flag of a dotted key."""
    return "--" + key.replace("_", "-")


def merge(sources: Iterable[Source], exclusive: Iterable[Set[str]]) -> Source:
    """Later sources beat earlier ones; one that sets any key of an ``exclusive`` group replaces the whole group."""
    merged: Source = {}
    groups = list(exclusive)
    for source in sources:
        beaten = set().union(*(group for group in groups if group & source.keys()))
        merged = {key: value for key, value in merged.items() if key not in beaten} | source
    return merged


def leaves(tree: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as its dotted key and its field, in the order of the tree."""
    for name, field in tree.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def nested(tree: type[BaseModel], source: Source) -> dict[str, object]:
    """The source as pydantic wants it, with every section present."""
    values: dict[str, Any] = {section: {} for section in _sections(tree)}
    for key, (value, _) in source.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values


def refuse_unknown(tree: type[BaseModel], source: Source) -> None:
    """``ConfigError`` naming every key that the tree does not have, its origin and the closest key that it has."""
    known = dict(leaves(tree))
    unknown = [f"{key} ({origin}): {_unknown(tree, key)}" for key, (_, origin) in source.items() if key not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))


def explain(tree: type[BaseModel], error: ValidationError, origins: Mapping[str, str] | None = None) -> str:
    """One line per problem: dotted key, value, origin if known, and what is allowed."""
    lines, secrets = [], {key for key, field in leaves(tree) if _is_secret(field.annotation)}
    for problem in error.errors(include_url=False):
        key, message = ".".join(map(str, problem["loc"])), problem["msg"]
        where = f" ({origins[key]})" if origins and key in origins else ""
        match problem["type"]:
            case "missing":
                lines.append(f"{key}: is required")
            case "extra_forbidden":
                lines.append(f"{key}{where}: {_unknown(tree, key)}")
            case "default_factory_not_called":
                continue  # follows from another problem, which has its own line
            case "value_error" if isinstance(problem["input"], dict):  # of a section: the message names the keys
                lines.append(": ".join(filter(None, (key, message.removeprefix("Value error, ")))))
            case _:
                message = re.sub(r"^(Value error, must|(Input|String) should)", "must", message)
                shown = "(secret)" if key in secrets else repr(problem["input"])
                lines.append(f"{key} = {shown}{where}: {message}")
    return "\n".join(lines)


def _is_secret(annotation: object) -> bool:
    return annotation is SecretStr or any(map(_is_secret, get_args(annotation)))


def _sections(tree: type[BaseModel]) -> set[str]:
    return {key.rpartition(".")[0] for key, _ in leaves(tree)} - {""}


def _flat(document: Mapping[str, object], sections: Set[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in document.items():
        if isinstance(value, dict) and prefix + name in sections:
            yield from _flat(value, sections, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _unknown(tree: type[BaseModel], key: str) -> str:
    keys = [known for known, _ in leaves(tree)]
    if inside := [known for known in keys if known.startswith(key + ".")]:
        return f"is a section, set its keys: {', '.join(inside)}"
    by_name = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = difflib.get_close_matches(key, [*keys, *sorted(_sections(tree))], 1) or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(by_name), 1)
    ]
    return "unknown key" + (f", did you mean {close[0]}?" if close else "")
