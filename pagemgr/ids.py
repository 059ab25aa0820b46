"""Token ids as callers give them, packed into int32 arrays; an id that is not known yet is negative."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, SequenceTooLong

TokenArray = npt.NDArray[np.int32]
Tokens = Iterable[int] | npt.ArrayLike
"""The ids of one sequence."""
BatchTokens = SequenceOf[Tokens | int] | npt.NDArray[np.integer[Any]]
"""For each sequence of a batch, its new ids or how many there will be; or an array ``[num_seqs, k]``."""
LateTokens = SequenceOf[Tokens | None] | npt.NDArray[np.integer[Any]] | None
"""The ids that were not known at ``reserve``, by sequence."""

UNKNOWN = -1


def pack_tokens(tokens: Iterable[int] | npt.ArrayLike) -> TokenArray:
    """Token ids as int32 ``[n]``. Raises ``InvalidInput`` unless they are integers in [0, 2**31)."""
    try:
        array = np.asarray(tokens if hasattr(tokens, "__array__") else list(tokens))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"token ids must be one row of integers, got {tokens!r:.80}") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidInput(f"token ids must be one row of integers, got {array.dtype} of shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise InvalidInput(f"token ids must be in [0, 2**31), got {low if low < 0 else high}")
    return np.array(array, dtype=np.int32)  # a copy: the caller may reuse its buffer


def pack_batch(tokens: BatchTokens, num_seqs: int, limit: int) -> tuple[npt.NDArray[np.int64], TokenArray]:
    """How many new tokens each sequence has, and all their ids in one row.

    Raises ``InvalidInput``, and ``SequenceTooLong`` for a count beyond ``limit``.
    """
    if len(tokens) != num_seqs:
        raise InvalidInput(f"{num_seqs} sequences but tokens for {len(tokens)}")
    if getattr(tokens, "ndim", 1) == 2:
        ids = pack_tokens(np.asarray(tokens).reshape(-1))
        counts = np.full(num_seqs, len(ids) // max(num_seqs, 1), dtype=np.int64)
    else:
        parts = [_pack_part(new, limit) for new in tokens]
        ids = np.concatenate([*parts, np.zeros(0, dtype=np.int32)])
        counts = np.array([len(part) for part in parts], dtype=np.int64)
    if num_seqs == 0 or (counts < 1).any():
        raise InvalidInput(f"a step needs sequences with at least one new token each, got {counts[:8].tolist()}")
    return counts, ids


def _pack_part(new: Tokens | int, limit: int) -> TokenArray:
    if not isinstance(new, int | np.integer):
        return pack_tokens(new)
    if new > limit:
        raise SequenceTooLong(int(new), limit)
    return np.full(max(int(new), 0), UNKNOWN, dtype=np.int32)


def fill_in(ids: TokenArray, starts: SequenceOf[int], late: LateTokens, wanted: npt.NDArray[np.bool_]) -> TokenArray:
    """``ids`` of a step with what came late; sequence ``i`` has those at ``starts[i]:starts[i + 1]``.

    Sequences that are not ``wanted`` are passed over. Raises ``InvalidInput`` where the ids were known, or do not fit.
    """
    if late is None:
        return ids
    if len(late) != len(wanted):
        raise InvalidInput(f"the step has {len(wanted)} sequences, got tokens for {len(late)}")
    filled = ids.copy()
    for i, new in enumerate(late):
        if new is None or not wanted[i]:
            continue
        mine = slice(starts[i], starts[i + 1])
        packed, room = pack_tokens(new), starts[i + 1] - starts[i]
        if ids[mine][0] != UNKNOWN:
            raise InvalidInput(f"the token ids of sequence {i} of the step were given at reserve")
        if len(packed) != room:
            raise InvalidInput(f"sequence {i} of the step was reserved for {room} tokens, got {len(packed)} ids")
        filled[mine] = packed
    return filled
