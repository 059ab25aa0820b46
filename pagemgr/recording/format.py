"""What stands in a log: which verbs, how each argument is written, and what came of a call."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pagemgr.errors import PagemgrError
from pagemgr.manager import BlockManager
from pagemgr.pins import Pin
from pagemgr.plan import Copies, Plan, Promotion, Transfer
from pagemgr.preemption import Preemption
from pagemgr.sequences import Sequence

FORMAT = 1
MARK = "pagemgr_log"
"""The first key of a log's first line; its value is the format."""

VERBS: dict[str, dict[str, str]] = {
    "add_many": {"prompts": "plain", "namespaces": "namespaces"},
    "admit": {"prompts": "plain", "namespaces": "namespaces"},
    "fork": {"sequence": "sequence", "n": "plain"},
    "truncate": {"sequences": "sequences", "lengths": "plain"},
    "free": {"sequences": "sequences", "after": "fence"},
    "reserve": {"sequences": "sequences", "tokens": "plain"},
    "commit": {"plan": "ticket", "tokens": "plain", "accepted": "plain"},
    "abort": {"plan": "ticket"},
    "swap_out": {"sequences": "sequences"},
    "swap_in": {"sequences": "sequences"},
    "finish": {"moved": "ticket", "after": "fence"},
    "cancel": {"moved": "ticket"},
    "pin": {"sequence": "sequence", "owner": "plain", "length": "plain", "until": "plain"},
    "unpin": {"pin": "pin"},
    "expire": {"now": "plain"},
    "clear": {},
    "preemption": {"sequences": "sequences", "counts": "plain", "candidates": "sequences"},
    "stats": {},  # as preemption, it lets go of what waited for fences
}
"""Every verb that decides something, and for each of its parameters the method of ``Scribe`` and ``Reader`` for it."""

READS = ("require_process", "add", "match", "lengths", "check", "subscribe", "unsubscribe")
"""Verbs that are not written: they decide nothing, or call one that is."""

UNSAYABLE = "unsayable"
"""Stands for what JSON cannot say, in the log and in the call: no verb takes such a thing."""

Ticket = Plan | Transfer | Promotion
"""What a call gives and a later one names."""


def plain(value: Any) -> Any:
    """Numbers, and rows of numbers of any kind, as JSON says them; iterators are used up."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    try:
        if hasattr(value, "__array__"):
            array = np.asarray(value)
            return array.tolist() if array.ndim and array.dtype.kind in "biuf" else UNSAYABLE
        items = list(value)
    except (TypeError, ValueError):
        return UNSAYABLE
    return items if set(map(type, items)) == {int} else [plain(item) for item in items]


def outcome(answer: object) -> dict[str, Any]:
    """What a call gave."""
    return {"gave": _said(answer)}


def ticket(answer: object) -> Ticket | None:
    """What a call gave that later ones may name."""
    last = answer[-1] if isinstance(answer, tuple) else answer
    return last if isinstance(last, Ticket) else None


def _said(answer: object) -> Any:
    """Numbers and handles as they are, and a fingerprint of all that an engine reads of a plan or move."""
    match answer:
        case int():
            return answer
        case Sequence():
            return [answer.row, answer.generation, answer.num_cached_tokens]
        case list() | tuple():
            return [_said(part) for part in answer]
        case Plan():
            return _fingerprint([answer.block_table, answer.query_start, answer.slot_mapping], answer.copies)
        case Transfer():
            return _fingerprint(answer.moved, answer.copies)
        case Promotion():
            return _fingerprint([answer.rows, answer.fresh], answer.copies)
        case Pin():
            return [answer.number, answer.length, _fingerprint([answer.blocks], ())]
        case Preemption():
            leaving = [[[one.row, one.generation] for one in some] for some in (answer.swap_out, answer.drop)]
            return [*leaving, answer.blocks, answer.swapped_blocks, answer.dropped_tokens, answer.missing]
    return None


def failure(error: BaseException) -> dict[str, Any]:
    """The error's name and numbers; a message may change."""
    numbers = vars(error) if isinstance(error, PagemgrError) else {}
    return {"error": type(error).__name__, "numbers": {name: plain(number) for name, number in numbers.items()}}


def digest(manager: BlockManager) -> str:
    """What ``stats().digest`` is, without asking fences."""
    return "-".join(f"{tier.digest:08x}" for tier in manager.tiers)


def _fingerprint(arrays: Iterable[npt.NDArray[Any]], copies: tuple[Copies, ...]) -> str:
    said = blake2b(digest_size=8)
    for name, array in (*(("", array) for array in arrays), *((f"{c.source} {c.target}", c.pairs) for c in copies)):
        said.update(f"{name} {array.shape}".encode() + array.astype("<i8").tobytes())
    return said.hexdigest()
