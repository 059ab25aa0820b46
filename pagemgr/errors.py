"""Every failure pagemgr can raise, as one tree.

    PagemgrError
    ├── OperatingError            happens in a correct program: handle it, nothing was changed
    │   ├── OutOfBlocks           a tier has too few blocks: free, swap out, wait for a fence, or shrink the batch
    │   ├── OutOfSequences        every row of the block table is taken
    │   ├── SequenceTooLong       a sequence would outgrow its row of the block table
    │   ├── PinQuotaExceeded      an owner would pin more blocks than it may
    │   ├── EventsLost            a listener fell too far behind
    │   ├── TransferFailed        bytes could not be moved between tiers; the sequences stayed where they were
    │   ├── ConfigError           a setting, or a combination of settings, that cannot work
    │   ├── BackendUnavailable    the backend cannot run on this machine
    │   │   └── NativeAbiMismatch a compiled library does not implement this pagemgr's native/pagemgr_abi.h
    │   └── UnsupportedFeature    the backend runs, but does not do what was asked
    ├── UsageError                the caller broke the contract: fix the caller, nothing was changed
    │   ├── StaleSequence         a handle whose sequence was freed
    │   ├── StalePin              a pin that has ended
    │   ├── SequenceBusy          the sequence has steps in flight, or is on its way between tiers
    │   ├── WrongTier             the sequence is in the other tier
    │   ├── StepOrderError        steps commit oldest first and abort newest first, once each
    │   ├── WrongProcess          a manager or cache that came through fork()
    │   └── InvalidInput          a value of the wrong type, shape or range
    └── InternalError             an invariant of pagemgr is broken: a bug in pagemgr, please report it

Numbers are attributes, so that a program can act on them without parsing the message.
"""

from __future__ import annotations

from pathlib import Path


class PagemgrError(Exception):
    """Base of everything pagemgr raises on purpose."""


class OperatingError(PagemgrError):
    """Happens in a correct program; the state is as it was before the call."""


class OutOfBlocks(OperatingError):
    """A tier cannot give the blocks a call needs.

    Attributes: ``requested``, ``available`` (free plus evictable now), ``fenced`` (released, but the device may
    still use them) in blocks; ``tier`` is ``"device"`` or ``"host"``.
    """

    def __init__(self, requested: int, available: int, fenced: int, tier: str) -> None:
        self.requested, self.available, self.fenced, self.tier = requested, available, fenced, tier
        super().__init__(
            f"{requested} {tier} blocks requested, {available} available ({fenced} more are fenced): "
            "free or swap out sequences, wait for a fence, or ask for less"
        )


class OutOfSequences(OperatingError):
    """Every row of the block table is taken. Attributes: ``requested``, ``available``, ``limit`` in sequences."""

    def __init__(self, requested: int, available: int, limit: int) -> None:
        self.requested, self.available, self.limit = requested, available, limit
        super().__init__(
            f"{requested} sequences requested, {available} of max_sequences={limit} are left: "
            "free sequences or raise pool.max_sequences"
        )


class SequenceTooLong(OperatingError):
    """A sequence would outgrow its row. Attributes: ``length`` it would reach and ``limit``, in tokens."""

    def __init__(self, length: int, limit: int) -> None:
        self.length, self.limit = length, limit
        super().__init__(f"a sequence of {length} tokens exceeds max_seq_len={limit}: raise pool.max_seq_len")


class PinQuotaExceeded(OperatingError):
    """An owner would pin more blocks than it may. Attributes: ``owner``, ``requested``, ``pinned``, ``quota``."""

    def __init__(self, owner: str, requested: int, pinned: int, quota: int) -> None:
        self.owner, self.requested, self.pinned, self.quota = owner, requested, pinned, quota
        super().__init__(
            f"{owner!r} has pinned {pinned} of the {quota} blocks it may and asks for {requested} more: "
            "unpin some or raise prefix.pin_share"
        )


class TransferFailed(OperatingError):
    """A copy between tiers failed; the sequences stayed where they were. The cause is chained.

    Attributes: ``source`` and ``target`` (tier names), ``blocks`` (how many were to be moved).
    """

    def __init__(self, source: str, target: str, blocks: int) -> None:
        self.source, self.target, self.blocks = source, target, blocks
        super().__init__(f"moving {blocks} blocks from {source} to {target} failed; nothing was moved")


class ConfigError(OperatingError):
    """A setting, or a combination of settings, that cannot work; the message carries the numbers."""


class BackendUnavailable(OperatingError):
    """Attributes: ``backend`` and ``reason`` (why it cannot run here and what to do about it)."""

    def __init__(self, backend: str, reason: str) -> None:
        self.backend, self.reason = backend, reason
        super().__init__(f"backend {backend!r} cannot run here: {reason}")


class NativeAbiMismatch(BackendUnavailable):
    """Attributes: ``backend``, ``library`` (its path) and ``reason`` (what differs and what to do about it)."""

    def __init__(self, backend: str, library: Path, reason: str) -> None:
        self.library = library
        super().__init__(backend, f"{library} does not fit: {reason}")


class UnsupportedFeature(OperatingError):
    """Raised before anything is launched. Attributes: ``backend`` and ``reasons``, a tuple of sentences."""

    def __init__(self, backend: str, reasons: tuple[str, ...]) -> None:
        self.backend, self.reasons = backend, reasons
        super().__init__(f"backend {backend!r} does not support this call: " + "; ".join(reasons))


class UsageError(PagemgrError):
    """The caller broke the contract; the state is as it was before the call."""


class StaleSequence(UsageError):
    """A handle whose sequence was freed. Attributes: ``row`` and ``generation`` of the handle."""

    def __init__(self, row: int, generation: int) -> None:
        self.row, self.generation = row, generation
        super().__init__(f"sequence (row {row}, generation {generation}) was freed")


class EventsLost(OperatingError):
    """A listener fell behind. Attribute: ``limit``, how many events may wait for it. Subscribe again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"more than {limit} events were waiting and some are lost: subscribe again for a snapshot")


class StalePin(UsageError):
    """A pin that was taken out, or that has ended. Attributes: ``number`` and ``owner``."""

    def __init__(self, number: int, owner: str) -> None:
        self.number, self.owner = number, owner
        super().__init__(f"pin {number} of {owner!r} has ended")


class SequenceBusy(UsageError):
    """The sequence has steps in flight or is being swapped. Attributes: ``row`` and ``verb``, the refused call."""

    def __init__(self, row: int, verb: str, reason: str) -> None:
        self.row, self.verb = row, verb
        super().__init__(f"cannot {verb} the sequence in row {row}: {reason}")


class WrongTier(UsageError):
    """The sequence is in another tier than the call needs. Attributes: ``row``, ``tier``, ``needed``."""

    def __init__(self, row: int, tier: str, needed: str) -> None:
        self.row, self.tier, self.needed = row, tier, needed
        super().__init__(f"the sequence in row {row} is in the {tier} tier, this call needs it in {needed}")


class StepOrderError(UsageError):
    """Steps commit oldest first and abort newest first, each exactly once."""


class WrongProcess(UsageError):
    """A manager was called in a child of its process. Attributes: ``owner`` and ``current``, process ids."""

    def __init__(self, owner: int, current: int) -> None:
        self.owner, self.current = owner, current
        super().__init__(f"this manager belongs to process {owner}, not to {current}: make one after fork()")


class InvalidInput(UsageError, ValueError):
    """A value of the wrong type, shape or range; the message names it and what is allowed."""


class InternalError(PagemgrError):
    """An invariant of pagemgr is broken. This is a bug in pagemgr."""
