"""A recorded trace as traffic on a cache: continuous batching, chunked prompts, preemption by swapping.

    waiting ─► running ─► done
       ▲        │   ▲
       │    out ▼   │ in
       └────── swapped       back to waiting, to start over, if the host has no room either

The manager's part is real: matching, blocks, evictions, swaps. Nothing is computed, so no K and V are written; the time
stamps of the trace are not kept, requests come as soon as there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pagemgr.cache import PagedKVCache
from pagemgr.errors import InvalidInput, OutOfBlocks
from pagemgr.ids import TokenArray
from pagemgr.sequences import Sequence as Handle
from pagemgr.traces import Request, TokenSource

PROMPT_TOKENS = 4096
"""Of all prompts together in one step."""
MOST_RUNNING = 64


@dataclass(eq=False, slots=True)
class _Reply:
    tokens: TokenArray
    """The prompt and the output, but for its last token, which is sampled and never run."""
    num_prompt: int
    computed: int = 0
    sequence: Handle | None = None


def trace_steps(cache: PagedKVCache, requests: Sequence[Request]) -> Iterator[None]:
    """Steps of an engine that serves these requests again and again, one for each ``next``.

    Requests that no sequence of the cache can hold are passed over; ``InvalidInput`` if that is all of them.
    """
    limit = cache.manager.max_seq_len
    served = [one for one in requests if one.input_length + one.output_length - 1 <= limit]
    if not served:
        shortest = min(one.input_length + one.output_length - 1 for one in requests)
        raise InvalidInput(
            f"no request of the trace fits: the shortest has {shortest} tokens, pool.max_seq_len is {limit}; "
            "raise pool.max_seq_len, and pool.num_blocks with it"
        )
    return _steps(_Traffic(cache, served))


def _steps(traffic: _Traffic) -> Iterator[None]:
    while True:
        traffic.step()
        yield


class _Traffic:
    def __init__(self, cache: PagedKVCache, requests: Sequence[Request]) -> None:
        self._cache = cache
        self._replies = _endless(requests)
        self._waiting: deque[_Reply] = deque()
        self._running: list[_Reply] = []
        self._swapped: deque[_Reply] = deque()
        self._most = min(MOST_RUNNING, cache.manager.table.max_sequences)

    def step(self) -> None:
        """Fill up what runs, run one step, and let go of what is done."""
        self._swap_in()
        self._admit()
        manager = self._cache.manager
        while True:
            batch = [(reply, new) for reply, new in self._next_tokens() if len(new)]
            try:
                plan = manager.reserve([_handle(reply) for reply, _ in batch], [new for _, new in batch])
                break
            except OutOfBlocks:
                self._preempt()
        manager.commit(plan)
        for reply, new in batch:
            reply.computed += len(new)
            if reply.computed == len(reply.tokens):
                self._running.remove(reply)
                manager.free([_handle(reply)])

    def _next_tokens(self) -> Iterator[tuple[_Reply, TokenArray]]:
        budget = PROMPT_TOKENS
        for reply in self._running:
            count = min(budget, reply.num_prompt - reply.computed)
            if reply.computed >= reply.num_prompt:
                count = 1
            else:
                budget -= count
            yield reply, reply.tokens[reply.computed : reply.computed + count]

    def _admit(self) -> None:
        while not self._swapped and len(self._running) < self._most:
            if not self._waiting:
                self._waiting.append(next(self._replies))
            reply = self._waiting[0]
            if not self._fits(len(reply.tokens)):
                return
            try:
                reply.sequence = self._cache.add(reply.tokens[: reply.num_prompt])
            except OutOfBlocks:  # it would not leave the watermark
                return
            self._waiting.popleft()
            reply.computed = reply.sequence.num_cached_tokens
            self._running.append(reply)

    def _fits(self, num_tokens: int) -> bool:
        """Whether it fits beside what the prompts under way still need; outputs grow as they may, and preempt."""
        blocks_for, device = self._cache.layout.blocks_for, self._cache.stats().device
        promised = sum(blocks_for(max(reply.num_prompt - reply.computed, 0)) + 1 for reply in self._running)
        return promised + blocks_for(num_tokens) <= device.free + device.cached

    def _swap_in(self) -> None:
        while self._swapped and self._fits(self._swapped[0].computed + 1):
            reply = self._swapped.popleft()
            self._cache.swap_in([_handle(reply)])
            self._running.append(reply)

    def _preempt(self) -> None:
        """The youngest makes room: in the host, or, if that is full or not there, by starting over."""
        reply = self._running.pop()
        if len(self._cache.manager.tiers) > 1:
            try:
                self._cache.swap_out([_handle(reply)])
            except OutOfBlocks:
                pass
            else:
                self._swapped.append(reply)
                return
        self._cache.free([_handle(reply)])
        reply.sequence = None
        self._waiting.appendleft(reply)


def _endless(requests: Sequence[Request]) -> Iterator[_Reply]:
    while True:
        source = TokenSource()  # anew for each round: its supply of unique tokens is large, not endless
        for request in requests:
            rest = source.unique(max(request.output_length - 1, 0))
            yield _Reply(np.concatenate([source.prompt(request), rest]), request.input_length)


def _handle(reply: _Reply) -> Handle:
    assert reply.sequence is not None  # of what runs or is swapped
    return reply.sequence
