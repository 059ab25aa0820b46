"""What every verb of the manager begins and ends with."""

from __future__ import annotations

import threading

from .errors import OutOfBlocks, OutOfSequences, PinQuotaExceeded, SequenceTooLong
from .ownership import OneProcess
from .stats import Counters
from .tier import Tier

_REFUSALS: dict[type[BaseException], str] = {
    OutOfBlocks: "out_of_blocks",
    OutOfSequences: "out_of_sequences",
    SequenceTooLong: "sequence_too_long",
    PinQuotaExceeded: "pin_quota_exceeded",
}


class Verb(OneProcess):
    """Runs a verb under the lock, once the blocks whose fences have passed are collected, and counts its refusal."""

    def __init__(self, lock: threading.RLock, tiers: tuple[Tier, ...], counters: Counters) -> None:
        self._lock, self._tiers, self._counters = lock, tiers, counters

    def __enter__(self) -> None:
        self.require_process()  # before the lock: a thread that does not exist here may hold it
        self._lock.acquire()
        try:
            for tier in self._tiers:
                tier.pool.poll()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        reason = _REFUSALS.get(kind) if kind is not None else None
        if isinstance(error, OutOfBlocks) and error.tier == "host":
            reason = "out_of_host_blocks"
        if reason is not None:
            self._counters.failures[reason] += 1
        self._lock.release()
