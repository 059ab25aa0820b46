"""Makes the calls of a log again and compares what comes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np

from pagemgr.errors import InvalidInput, OperatingError
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.pool import BlockState
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

from .format import FORMAT, MARK, VERBS, Ticket, digest, failure, outcome, ticket


@dataclass(frozen=True, slots=True)
class Difference:
    """The first call of which something else came."""

    line: int
    call: int
    verb: str
    recorded: dict[str, Any]
    """What it gave or the error it raised, and the digest after it."""
    replayed: dict[str, Any]

    def __str__(self) -> str:
        both = [(key, self.recorded.get(key), self.replayed.get(key)) for key in self.recorded | self.replayed]
        found = "; ".join(f"{key}: recorded {old}, replayed {new}" for key, old, new in both if old != new)
        return f"line {self.line}, call {self.call} ({self.verb}): {found}"


@dataclass(frozen=True, slots=True)
class LogReplay:
    """What a log holds, up to its end or to the first difference."""

    manager: dict[str, Any]
    """What the manager was made with."""
    calls: dict[str, int]
    """By verb."""
    failures: dict[str, int]
    """Calls that were refused or failed, by the error's name."""
    peak_used: int
    """The most device blocks that sequences held after a call."""
    is_cut: bool
    """The last line is not whole, and was passed over: the writer was stopped."""
    difference: Difference | None


def is_log(path: str | Path) -> bool:
    """Whether this file is a log of calls, by its first bytes."""
    mark = json.dumps({MARK: FORMAT})[: len(MARK) + 4].encode()
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


def replay_log(path: str | Path, secret: bytes = b"") -> LogReplay:
    """Make the calls of a log on a new manager, until something else comes of one.

    A log does not hold the manager's ``secret``, if there was one; names depend on it, and on names which prompt is
    found by its first tokens and what is evicted. Raises ``InvalidInput`` without it, or naming the file and the line
    that cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            return _replay(lines, str(path), secret)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the log {path}: {error}") from error


def _replay(lines: TextIO, path: str, secret: bytes) -> LogReplay:
    sizes, manager = _made(lines.readline(), path, secret)
    reader = _Reader(manager)
    calls: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    peak, is_cut, difference = 0, False, None
    for number, line in enumerate(lines, start=2):
        if is_cut := not line.endswith("\n"):
            break
        record, given = _parsed(line, f"{path}, line {number}", reader)
        came = _call(manager, record, given, reader) | {"digest": digest(manager)}
        calls[record["verb"]] += 1
        failures.update([came["error"]] if "error" in came else [])
        counts = manager.tiers[0].pool.counts
        peak = max(peak, counts[BlockState.open] + counts[BlockState.full])
        recorded: dict[str, Any] = {key: record[key] for key in ("gave", "error", "numbers", "digest") if key in record}
        if came != recorded:
            difference = Difference(number, record["call"], record["verb"], recorded, came)
            break
    return LogReplay(sizes, dict(calls), dict(failures), peak, is_cut, difference)


def _made(line: str, path: str, secret: bytes) -> tuple[dict[str, Any], BlockManager]:
    try:
        header = json.loads(line)
        if header[MARK] != FORMAT:
            raise InvalidInput(f"{path} has format {header[MARK]}, this version reads {FORMAT}")
        sizes = header["manager"]
        if "cache_dir" in sizes:
            raise InvalidInput(f"{path}, line 1: no log says from where to load libraries, but this one: cache_dir")
        if sizes["secret"] and not secret:
            raise InvalidInput(f"{path} was recorded with a secret, which it does not hold: pass it to replay_log")
        given = {"secret": secret if sizes["secret"] else b"", "windows": tuple(sizes["windows"])}
        return sizes, BlockManager(**sizes | given)
    except (ValueError, KeyError, TypeError, OperatingError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}, line 1: not the start of a log of calls ({error!r})") from error


def _parsed(line: str, where: str, reader: _Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of a call, and the arguments to make it with."""
    try:
        record = json.loads(line)
        reader.turn(record["call"], record.get("fences", {}))
        kinds = VERBS[record["verb"]]
        return record, {name: getattr(reader, kinds[name])(said) for name, said in record["given"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise InvalidInput(f"{where}: {error}") from error
        raise InvalidInput(f"{where}: not a call of a log ({error!r})") from error


def _call(manager: BlockManager, record: dict[str, Any], given: dict[str, Any], reader: _Reader) -> dict[str, Any]:
    try:
        answer = getattr(manager, record["verb"])(**given)
    except Exception as error:  # whatever it is, it is compared with what was recorded
        return failure(error)
    reader.succeeded(answer, record["given"])
    return outcome(answer)


class _Reader:
    """Turns what was written of an argument back into one."""

    def __init__(self, manager: BlockManager) -> None:
        self._call = 0
        self._pins = manager.pins
        self._tickets: dict[int, Ticket] = {}
        self._passed: set[int] = set()
        self._failed: dict[int, str] = {}

    def turn(self, call: int, answers: Mapping[str, bool | str]) -> None:
        """The next call begins, in which fences answer this."""
        if call != self._call + 1:
            raise InvalidInput(f"call {call} where call {self._call + 1} is due")
        self._call = call
        self._passed |= {int(number) for number, answer in answers.items() if answer is True}
        self._failed = {int(number): answer for number, answer in answers.items() if isinstance(answer, str)}

    def succeeded(self, answer: object, said: Mapping[str, Any]) -> None:
        """The call gave a plan or move, or ended the one that it named."""
        given = ticket(answer)
        if given is not None:
            self._tickets[self._call] = given
        for name in ("plan", "moved"):
            self._tickets.pop(said.get(name, 0), None)

    def ask(self, number: int) -> bool:
        """What the fence of that call answers in this one."""
        if number in self._failed:
            raise type(self._failed[number], (Exception,), {})("a fence failed here")
        return number in self._passed

    def plain(self, said: Any) -> Any:
        """As it was written."""
        return said

    def sequence(self, said: Any) -> Any:
        """A handle."""
        return Sequence(*said) if isinstance(said, list) else said

    def sequences(self, said: Any) -> Any:
        """Handles."""
        return [self.sequence(pair) for pair in said] if isinstance(said, list) else said

    def namespaces(self, said: Any) -> Any:
        """Namespaces and none."""
        return None if said is None else [_namespace(space) for space in said]

    def ticket(self, said: Any) -> Any:
        """The plan or move that this call gave, or one that nobody knows."""
        none = np.zeros(0, dtype=np.int64)
        unknown = SimpleNamespace(step=0, rows=none, generations=none) if isinstance(said, int) else said
        return self._tickets.get(said, unknown)

    def pin(self, said: Any) -> Any:
        """The pin that stands under this number, or one that does not."""
        if not isinstance(said, list):
            return said
        number, owner, stands = said
        ended = Pin(number, owner, 0, None, np.zeros(0, dtype=np.int32))
        return next((pin for pin in self._pins if stands and pin.number == number), ended)

    def fence(self, said: Any) -> Any:
        """A fence that answers as the recorded one did."""
        return _ReplayedFence(said, self) if isinstance(said, int) else said


def _namespace(said: Any) -> Any:
    return Namespace(**{name: _field(value) for name, value in said.items()}) if isinstance(said, dict) else said


def _field(said: Any) -> Any:
    if isinstance(said, dict):
        return bytes.fromhex(said["hex"])
    return tuple(_field(part) for part in said) if isinstance(said, list) else said


@dataclass(frozen=True, slots=True)
class _ReplayedFence:
    number: int
    reader: _Reader

    def query(self) -> bool:
        return self.reader.ask(self.number)
