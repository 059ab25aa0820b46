"""The best hit ratio that any policy could have reached on a trace, knowing the future (Belady, 1966).

The cache is the manager's: a request holds all of its blocks while it runs, so that the room it needs is taken from the
others, and only then. What is used again last goes first, children before parents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .ids import TokenArray
from .prefix import Namespace, hash_blocks, split_names
from .traces import Request, TokenSource

Ints = npt.NDArray[np.int64]
NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Visit:
    """A request as the cache sees it."""

    tokens: int
    """Of the prompt."""
    contents: Ints
    """A number for each full block; equal numbers are equal content after an equal prefix."""
    matchable: int
    """How many of them a hit can cover: at least one token of the prompt is always left to run."""
    held: int
    """Blocks that the request holds while it runs."""


def visits(requests: Iterable[Request], block_size: int) -> list[Visit]:
    """The requests of a trace, one at a time as ``replay`` serves them."""
    numbers: dict[bytes, int] = {}
    source = TokenSource()
    root = Namespace().root(block_size)
    found = []
    for request in requests:
        length = request.input_length + max(request.output_length - 1, 0)
        prompt = source.prompt(request)
        tokens: TokenArray = np.concatenate([prompt, source.unique(length - len(prompt))])
        names = split_names(hash_blocks(root, tokens, block_size))
        contents = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
        matchable = min((request.input_length - 1) // block_size, len(contents))
        found.append(Visit(request.input_length, contents, matchable, -(-length // block_size)))
    return found


def optimum(trace: list[Visit], usable_blocks: int, block_size: int) -> float:
    """Hit ratio by tokens, 0 to 1. Requests larger than the whole pool are passed over, as ``replay`` does."""
    served = [visit for visit in trace if visit.held <= usable_blocks]
    after = _next_visits(served)
    size = 1 + max((int(visit.contents.max(initial=0)) for visit in served), default=0)
    next_use = np.full(size, NEVER, dtype=np.int64)
    depth = np.zeros(size, dtype=np.int64)
    cached = np.zeros(size, dtype=np.bool_)
    hit_tokens = prompt_tokens = held = 0
    for visit, following in zip(served, after, strict=True):
        contents = visit.contents
        missing = np.flatnonzero(~cached[contents[: visit.matchable]])
        hits = int(missing[0]) if len(missing) else visit.matchable
        hit_tokens += hits * block_size
        prompt_tokens += visit.tokens
        excess = held + visit.held - hits - usable_blocks
        if excess > 0:
            cached[contents[:hits]] = False
            next_use[contents] = NEVER  # the request computes what it did not hit: a copy elsewhere is no loss
            others = np.flatnonzero(cached)
            last = np.lexsort((-depth[others], -next_use[others]))[:excess]
            cached[others[last]] = False
            held -= excess
        cached[contents[:hits]] = True
        held += int(np.count_nonzero(~cached[contents]))
        cached[contents] = True
        next_use[contents] = following
        depth[contents] = np.arange(len(contents))
    return hit_tokens / prompt_tokens if prompt_tokens else 0.0


def _next_visits(trace: list[Visit]) -> list[Ints]:
    """For each content of each visit, the number of the next visit with it, or ``NEVER``."""
    sizes = [len(visit.contents) for visit in trace]
    contents = np.concatenate([*(visit.contents for visit in trace), np.zeros(0, dtype=np.int64)])
    order = np.argsort(contents, kind="stable")
    which = np.repeat(np.arange(len(trace)), sizes)[order]
    same = contents[order][1:] == contents[order][:-1]
    following = np.full(len(contents), NEVER, dtype=np.int64)
    following[order[:-1][same]] = which[1:][same]
    return np.split(following, np.cumsum(sizes)[:-1]) if trace else []
