"""A manager that writes down each of its calls."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pagemgr.errors import ConfigError
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin, Pins
from pagemgr.pool import Fence
from pagemgr.prefix import Namespace
from pagemgr.sequences import Batch, Sequence

from .format import FORMAT, MARK, UNSAYABLE, VERBS, Ticket, digest, failure, outcome, plain, ticket

_log = logging.getLogger("pagemgr")


class RecordingManager(BlockManager):
    """A manager that writes its log to the new file ``log``; everything else is ``BlockManager``'s.

    If the log cannot be written any more, that is logged once and the manager goes on without. Raises ``ConfigError``
    if there is such a file or it cannot be made, and whatever ``BlockManager`` raises.
    """

    def __init__(self, log: str | Path, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        made_with = inspect.signature(BlockManager).bind(*sizes, **more)
        made_with.apply_defaults()
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot make the log of calls {str(log)!r}: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)  # a line is out before its call returns
        weakref.finalize(self, self._file.close)
        self._scribe = Scribe(self.pins)
        self._is_writing = False
        arguments = {name: value for name, value in made_with.arguments.items() if name != "cache_dir"}
        arguments["secret"] = bool(arguments["secret"])
        self._write({MARK: FORMAT, "manager": arguments})

    def _record(self, verb: str, bound: inspect.BoundArguments, method: Callable[..., Any]) -> Any:
        """Make a call with exactly what was written of its arguments."""
        self.require_process()  # a child shares the file
        with self._lock:
            if self._is_writing:  # a verb that a fence calls while it is asked is part of the call that asks
                return method(*bound.args, **bound.kwargs)
            self._is_writing = True
            try:
                self._scribe.turn()
                given = {}
                for name, kind in VERBS[verb].items():
                    if name in bound.arguments:
                        bound.arguments[name], given[name] = getattr(self._scribe, kind)(bound.arguments[name])
                return self._make(verb, given, functools.partial(method, *bound.args, **bound.kwargs))
            finally:
                self._is_writing = False

    def _make(self, verb: str, given: dict[str, Any], call: Callable[[], Any]) -> Any:
        came: dict[str, Any] = {}
        try:
            answer = call()
            came = outcome(answer)
            self._scribe.succeeded(answer)
            return answer
        except BaseException as error:
            came = failure(error)
            raise
        finally:
            head = {"call": self._scribe.call, "verb": verb, "given": given}
            self._write(head | self._scribe.answered() | came | {"digest": digest(self)})
            self._scribe.calls_made += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            _log.warning("the log of calls ends after call %d: %s", self._scribe.calls_made, error)
            with contextlib.suppress(OSError):
                self._file.close()


def _recorded(verb: str) -> Callable[..., Any]:
    method = getattr(BlockManager, verb)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: RecordingManager, *args: Any, **more: Any) -> Any:
        return self._record(verb, signature.bind(self, *args, **more), method)

    return call


for _verb in VERBS:
    setattr(RecordingManager, _verb, _recorded(_verb))


class Scribe:
    """Turns each argument into what the call is made with, and what is written of it."""

    def __init__(self, pins: Pins) -> None:
        self.calls_made = 0
        self._pins = pins
        self._answers: dict[str, bool | str] = {}
        self._tickets: dict[int, tuple[object, int]] = {}
        self._named: int | None = None

    @property
    def call(self) -> int:
        """The number of the call that is being made."""
        return self.calls_made + 1

    def turn(self) -> None:
        """A call begins."""
        self._answers, self._named = {}, None

    def succeeded(self, answer: object) -> None:
        """The call gave a plan or move, or ended the one that it named."""
        given = ticket(answer)
        if given is not None:
            self._tickets[id(given)] = given, self.call
        elif self._named is not None:
            self._tickets.pop(self._named, None)

    def answered(self) -> dict[str, Any]:
        """What fences answered in this call, other than "not yet"."""
        return {"fences": self._answers} if self._answers else {}

    def heard(self, number: int, answer: bool | str) -> None:
        """The fence of that call answered."""
        self._answers[str(number)] = answer

    def plain(self, value: object) -> tuple[Any, Any]:
        """Numbers and rows of numbers; an array is passed on, as it means what its list does and is packed faster."""
        said = plain(value)
        return (value if isinstance(value, np.ndarray) and said is not UNSAYABLE else said), said

    def sequence(self, value: Any) -> tuple[Any, Any]:
        """One handle, with what a fork inherits."""
        if isinstance(value, Sequence):
            return value, [*_pair(value), value.num_cached_tokens]
        return UNSAYABLE, UNSAYABLE

    def sequences(self, value: Any) -> tuple[Any, Any]:
        """Handles, or a batch of them."""
        if isinstance(value, Batch):
            return value, np.stack([value.rows, value.generations], axis=1).tolist()
        try:
            handles = [handle if isinstance(handle, Sequence) else UNSAYABLE for handle in value]
        except TypeError:
            return UNSAYABLE, UNSAYABLE
        return handles, [_pair(handle) if isinstance(handle, Sequence) else handle for handle in handles]

    def namespaces(self, value: Any) -> tuple[Any, Any]:
        """Namespaces and none."""
        return value, None if value is None else [_namespace(space) for space in value]

    def ticket(self, value: object) -> tuple[Any, Any]:
        """The call that gave this plan or move; 0 if none did, or it has ended."""
        if not isinstance(value, Ticket):
            return UNSAYABLE, UNSAYABLE
        self._named = id(value)
        return value, self._tickets.get(id(value), (None, 0))[1]

    def pin(self, value: object) -> tuple[Any, Any]:
        """Its number and owner, and whether it stands: others may have the same number."""
        if not isinstance(value, Pin):
            return UNSAYABLE, UNSAYABLE
        return value, [value.number, value.owner, value in self._pins]

    def fence(self, value: Any) -> tuple[Any, Any]:
        """The number of this call, and the fence with a pen beside it."""
        if not callable(getattr(value, "query", None)):
            return (None, None) if value is None else (UNSAYABLE, UNSAYABLE)
        return _RecordedFence(value, self.call, self), self.call


def _pair(handle: Sequence) -> list[int]:
    return [int(handle.row), int(handle.generation)]


def _namespace(space: object) -> Any:
    if isinstance(space, Namespace):
        return {name: _field(value) for name, value in asdict(space).items()}
    return UNSAYABLE if space else None


def _field(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [_field(part) for part in value] if isinstance(value, list | tuple) else plain(value)


class _RecordedFence:
    """Asked once a call, so that a replay needs one answer for each."""

    def __init__(self, fence: Fence, number: int, scribe: Scribe) -> None:
        self._fence, self._number, self._scribe = fence, number, scribe
        self._asked = 0
        self._passed = False
        self._error: Exception | None = None

    def query(self) -> bool:
        """As the fence itself."""
        if self._asked != self._scribe.call and not self._passed:
            self._asked, self._error = self._scribe.call, None
            try:
                self._passed = bool(self._fence.query())
            except Exception as error:
                self._error = error
                self._scribe.heard(self._number, type(error).__name__)
            if self._passed:
                self._scribe.heard(self._number, True)
        if self._error is not None:
            raise self._error
        return self._passed
