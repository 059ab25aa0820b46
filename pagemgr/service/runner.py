"""A workload on a cache for as long as it is served: an iterator of an engine's steps, run in a thread at its pace."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

STEP_SECONDS = 0.02
"""From one step to the next: the pace of an engine that decodes with a model of some size."""

_log = logging.getLogger("pagemgr.service")


class Workload:
    """Takes one step after the other until the steps end, one fails, or it is closed."""

    def __init__(self, steps: Iterator[object], name: str) -> None:
        self.name = name
        self.failure: str | None = None
        """The kind of error that ended it before its time; the log has the rest."""
        self._steps = steps
        self._running = threading.Event()
        self._running.set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagemgr-workload", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``ended`` or ``failed``."""
        if self.failure is not None:
            return "failed"
        if not self._thread.is_alive():
            return "ended"
        return "running" if self._running.is_set() else "paused"

    def pause(self) -> None:
        """No step begins until ``resume``."""
        self._running.clear()

    def resume(self) -> None:
        """Go on."""
        self._running.set()

    def close(self) -> None:
        """End after the step under way. Closing twice is fine."""
        self._closed.set()
        self._running.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for _ in self._steps:
                self._closed.wait(STEP_SECONDS)
                self._running.wait()
                if self._closed.is_set():
                    return
        except Exception as error:  # the pool stays up to be looked at
            self.failure = type(error).__name__
            _log.exception("the workload failed", extra={"workload": self.name})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
