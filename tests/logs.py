"""Logs of calls, for tests: read line by line, and changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def edited(log: Path, edit: Callable[[list[dict[str, Any]]], object]) -> Path:
    """The log, with its lines changed by ``edit``."""
    changed = lines(log)
    edit(changed)
    other = log.with_name("edited.log")
    other.write_text("".join(json.dumps(line) + "\n" for line in changed))
    return other
