"""What a setting may be: the types of the fields in ``config.py``, each with its check and its words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from .errors import InvalidInput
from .eviction import names as policy_names

INT32_MAX = 2**31 - 1
"""Block ids and sequence lengths are int32."""

MIN_TOKEN = 16
"""Characters of the service's token."""

_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Bytes from a count or from text such as ``"4GiB"``, ``"512 MiB"`` or ``"1.5GB"``; ``InvalidInput`` otherwise."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", size.strip(), re.ASCII)):
        number, unit = match[1], match[2].lower() or "b"
        if unit in _UNITS:
            return int(number) * _UNITS[unit] if number.isdigit() else int(float(number) * _UNITS[unit])
    raise InvalidInput(f'must be bytes as a whole number or as text like "4GiB", "512MiB" or "1.5GB", got {size!r}')


def _checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A validator that keeps the value as it was written."""

    def validate(value: Any) -> Any:
        check(value)
        return value

    return validate


def _no_bool(value: object) -> None:
    if isinstance(value, bool):
        raise InvalidInput("must be a number")


def _split(value: object) -> object:
    """Numbers with commas between them, as flags and variables have them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _long_enough(secret: SecretStr) -> None:
    if not 16 <= len(secret.get_secret_value().encode()) <= 64:
        raise InvalidInput("must be 16 to 64 bytes")


def _known_policy(name: str) -> None:
    if name not in policy_names():
        raise InvalidInput(f"must be one of {', '.join(policy_names())}")


def _known_device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name, re.ASCII):
        raise InvalidInput("must be auto, cpu, cuda or cuda:N")


def _hard_to_guess(token: SecretStr) -> None:
    text = token.get_secret_value()
    if len(text) < MIN_TOKEN or not re.fullmatch(r"[!-~]+", text, re.ASCII):
        raise InvalidInput(f"must be at least {MIN_TOKEN} visible ASCII characters: try openssl rand -hex 16")


Whole = Annotated[int, BeforeValidator(_checked(_no_bool)), Field(ge=0, le=INT32_MAX)]
Count = Annotated[Whole, Field(ge=1)]
Share = Annotated[float, BeforeValidator(_checked(_no_bool)), Field(gt=0, le=1)]
Bytes = Annotated[int | str, BeforeValidator(_checked(parse_bytes))]
Name = Annotated[str, Field(min_length=1)]
Windows = Annotated[tuple[Whole, ...], BeforeValidator(_split)]
Fraction = Annotated[float, BeforeValidator(_checked(_no_bool)), Field(ge=0, le=1)]
Policy = Annotated[str, AfterValidator(_checked(_known_policy))]
Device = Annotated[str, AfterValidator(_checked(_known_device))]
Key = Annotated[SecretStr, AfterValidator(_checked(_long_enough))]
Token = Annotated[SecretStr, AfterValidator(_checked(_hard_to_guess))]
