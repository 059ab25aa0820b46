"""Recorded request traces: three public schemas of gzip or plain JSON lines, read as prompts of token ids.

    mooncake   {"timestamp", "input_length", "output_length", "hash_ids": [id, ...]}        an id per 512 tokens
    agentic    {"timestamp", "input_length", "output_length", "hash_runs": [[first, n]]}    an id per full 64 tokens
    lengths    {"timestamp", "input_length", "output_length"}                               no prefixes (Azure)

A trace names content by ids, never by tokens; here an id becomes as many equal tokens as it stands for, so that equal
prefixes of ids are equal prefixes of tokens at any block size. Content without an id gets tokens that nobody else has.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InvalidInput
from .ids import TokenArray
from .plan import Ints

MOONCAKE_BLOCK = 512
AGENTIC_BLOCK = 64
_FIRST_UNIQUE = 2**30


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a trace. ``timestamp`` in the trace's own unit; lengths in tokens."""

    timestamp: float
    input_length: int
    output_length: int
    ids: Ints
    """Content ids, one for each ``id_tokens`` tokens of the prompt."""
    id_tokens: int


class TokenSource:
    """Turns requests into token ids; one source serves one replay, so that unique tokens stay unique."""

    def __init__(self) -> None:
        self._next = _FIRST_UNIQUE

    def prompt(self, request: Request) -> TokenArray:
        """int32 ``[input_length]``."""
        known = np.repeat(request.ids, request.id_tokens)[: request.input_length].astype(np.int32)
        return np.concatenate([known, self.unique(request.input_length - len(known))])

    def unique(self, count: int) -> TokenArray:
        """int32 ``[count]``, never given before."""
        start, self._next = self._next, self._next + count
        if self._next > 2**31:
            raise InvalidInput(f"the trace has more than {2**31 - _FIRST_UNIQUE} tokens without an id")
        return np.arange(start, self._next, dtype=np.int32)


def read_trace(path: str | Path) -> list[Request]:
    """All requests of a trace in file order. ``InvalidInput`` names the file and the line that cannot be read."""
    opener = gzip.open if str(path).endswith(".gz") else open
    requests: list[Request] = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the trace {path}: {error}") from error
    if not requests:
        raise InvalidInput(f"the trace {path} has no requests")
    return requests


def _parse(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
        lengths = int(row["input_length"]), int(row["output_length"])
        if "hash_ids" in row:
            ids, size = np.array(row["hash_ids"], dtype=np.int64), MOONCAKE_BLOCK
        elif "hash_runs" in row:
            runs = [np.arange(first, first + count) for first, count in row["hash_runs"]]
            ids, size = np.concatenate([*runs, np.zeros(0, dtype=np.int64)]), AGENTIC_BLOCK
        else:
            ids, size = np.zeros(0, dtype=np.int64), 1
        request = Request(float(row.get("timestamp", 0)), *lengths, ids, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{where}: not a request of a known schema ({type(error).__name__}: {error})") from error
    if min(lengths) < 0 or lengths[0] < 1:
        raise InvalidInput(f"{where}: input_length must be at least 1 and output_length at least 0, got {lengths}")
    if len(ids) and (ids.min() < 0 or ids.max() >= _FIRST_UNIQUE):
        raise InvalidInput(f"{where}: ids must be in [0, {_FIRST_UNIQUE}), got {int(ids.min())} to {int(ids.max())}")
    return request
