"""The demo's engine around ``PagedKVCache``: continuous batching, parallel replies, preemption by swapping.

    due ─► waiting ─► running ─► (next turn is due)
              ▲         │  ▲
              │     out ▼  │ in
              └────── swapped            back to waiting, to be computed anew, only if the host is full too

Older replies go first: they are admitted, swapped in and kept before younger ones.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import torch

from pagemgr.cache import PagedKVCache, Step
from pagemgr.errors import OutOfBlocks
from pagemgr.metrics import bytes_by_cause
from pagemgr.sequences import Sequence
from pagemgr.workload import Conversation, Turn

from .toy_model import VOCABULARY, ToyModel

PREFILL_TOKENS = 256
"""Prompt tokens that one step computes at most, so that a long prompt does not hold up the others."""
FAILURE_RATE = 1 / 50
"""Share of the steps that fail, and are run again."""
CHECK_EVERY = 64
"""Steps from one check of every invariant to the next."""


@dataclass(eq=False, slots=True)
class Talk:
    """A conversation under way."""

    turns: list[Turn]
    """Those to come, the current one first."""
    history: list[int]
    open_replies: int = 0


@dataclass(eq=False, slots=True)
class Reply:
    """One reply being generated, in a sequence of its own once it is admitted."""

    talk: Talk
    order: int
    """The older, the smaller; replies of one turn have the same."""
    tokens: list[int]
    """The prompt and what was generated so far."""
    left: int
    """Tokens still to generate."""
    forks: int
    """Replies to split off once the prompt is computed."""
    kept: bool = True
    """Whether the conversation goes on with it."""
    sequence: Sequence | None = None
    computed: int = 0
    """Tokens whose K and V are in the cache."""
    past: set[str] = field(default_factory=set)
    """What happened to it: "prefix hit", "fork", "swap", "restart"."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The device's memory after a step, in bytes, and what a contiguous cache would hold for the same sequences."""

    causes: dict[str, int]
    saved: int
    sequences: int
    contiguous_used: int
    contiguous_reserved: int


class ToyEngine:
    """Runs a workload to its end, one ``tick`` after the other, and remembers what the memory looked like."""

    def __init__(self, cache: PagedKVCache, workload: list[Conversation], seed: int, verify_every: int) -> None:
        self.cache = cache
        self.moments: list[Moment] = []
        self.verified: list[tuple[float, frozenset[str]]] = []
        """Error of the last hidden state, and the past: every ``verify_every``-th reply, and the first of each past."""
        self.replies_done = 0
        self.restarts = 0
        self._model = ToyModel.random(cache.config.model, cache.manager.max_seq_len, seed)
        self._fast_model = self._model.to(torch.float32)
        self._verify_every = verify_every
        self._rng = np.random.default_rng(seed)
        self._now = 0
        self._order = count()
        self._due: list[tuple[int, int, Talk]] = []
        self._waiting: list[Reply] = []
        self._running: list[Reply] = []
        self._swapped: list[Reply] = []
        for conversation in workload:
            self._pause(Talk(list(conversation.turns), list(conversation.system)))

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._due or self._waiting or self._running or self._swapped)

    def tick(self) -> None:
        """One step of the engine."""
        self._now += 1
        while self._due and self._due[0][0] <= self._now:
            self._arrive(heapq.heappop(self._due)[2])
        self._swap_in()
        self._admit()
        if not self._running:
            return
        batch, step = self._reserve()
        with step:
            hidden = self._compute(batch, step)
            if self._rng.random() < FAILURE_RATE:
                return  # leaving without commit aborts: the next tick runs the same again
            step.commit()
        self._advance(batch, hidden)
        self._remember()
        if self._now % CHECK_EVERY == 0:
            self.cache.manager.check()

    # Who runs -------------------------------------------------------------------------------------------------------

    def _pause(self, talk: Talk) -> None:
        """The user thinks, then takes the next turn."""
        heapq.heappush(self._due, (self._now + talk.turns[0].pause, next(self._order), talk))

    def _arrive(self, talk: Talk) -> None:
        turn = talk.turns[0]
        talk.history += turn.message
        talk.open_replies = turn.num_replies
        reply = Reply(talk, next(self._order), list(talk.history), turn.reply_tokens, forks=turn.num_replies - 1)
        self._waiting.append(reply)

    def _fits(self, num_tokens: int, spare: int) -> bool:
        """Whether a sequence of that length fits, and leaves ``spare`` blocks."""
        device = self.cache.stats().device
        return self.cache.layout.blocks_for(num_tokens + 1) + spare <= device.free + device.cached

    def _swap_in(self) -> None:
        while self._swapped and self._fits(self._swapped[0].computed, spare=len(self._running)):
            reply = self._swapped.pop(0)
            assert reply.sequence is not None
            self.cache.swap_in([reply.sequence])
            self._run(reply)

    def _admit(self) -> None:
        """Those who wait, once nobody is swapped out."""
        limit = self.cache.config.pool.max_sequences
        while self._waiting and not self._swapped:
            reply = self._waiting[0]
            rows = sum(1 + one.forks for one in (reply, *self._running))
            if rows > limit or not self._fits(len(reply.tokens), spare=0):
                return
            self._waiting.pop(0)
            reply.sequence = self.cache.add(reply.tokens)
            reply.computed = reply.sequence.num_cached_tokens
            if reply.computed:
                reply.past.add("prefix hit")
            self._run(reply)

    def _run(self, reply: Reply) -> None:
        self._running.append(reply)
        self._running.sort(key=lambda running: running.order)

    def _preempt(self) -> None:
        """Make room: the youngest goes to the host, or starts over if there is no room either."""
        reply = self._running.pop()
        assert reply.sequence is not None
        try:
            self.cache.swap_out([reply.sequence])
        except OutOfBlocks:
            self.cache.free([reply.sequence])
            reply.sequence = None
            reply.past.add("restart")
            self.restarts += 1
            line = self._waiting
        else:
            reply.past.add("swap")
            line = self._swapped
        line.append(reply)
        line.sort(key=lambda one: one.order)

    # One step -------------------------------------------------------------------------------------------------------

    def _batch(self) -> list[tuple[Reply, list[int]]]:
        """Who computes which tokens: one each, and as much of the new prompts as a step may."""
        budget, batch = PREFILL_TOKENS, []
        for reply in self._running:
            new = reply.tokens[reply.computed :]
            if len(new) > 1:
                new = new[:budget]
                budget -= len(new)
            if new:
                batch.append((reply, new))
        return batch

    def _reserve(self) -> tuple[list[tuple[Reply, list[int]]], Step]:
        while True:
            batch = self._batch()
            sequences = [reply.sequence for reply, _ in batch if reply.sequence is not None]
            try:
                return batch, self.cache.step(sequences, [new for _, new in batch])
            except OutOfBlocks:
                self._preempt()

    def _compute(self, batch: list[tuple[Reply, list[int]]], step: Step) -> torch.Tensor:
        """Hidden states of the last new token of each sequence, ``[num_seqs, width]``."""
        tokens = torch.tensor([token for _, new in batch for token in new])
        positions = torch.cat([torch.arange(r.computed, r.computed + len(new)) for r, new in batch])
        return self._fast_model.run(tokens, positions, step.attention)[step.batches[0].query_start[1:] - 1]

    def _advance(self, batch: list[tuple[Reply, list[int]]], hidden: torch.Tensor) -> None:
        for (reply, new), state in zip(batch, hidden, strict=True):
            reply.computed += len(new)
            if reply.computed < len(reply.tokens):
                continue  # the prompt goes on in the next step
            logits = (self._fast_model.embedding @ state).double().numpy()
            for one in (reply, *self._fork(reply)):
                noise = self._rng.gumbel(size=VOCABULARY)  # makes the largest a sample at temperature 1
                one.tokens.append(int(np.argmax(logits + noise)))
                one.left -= 1
                if one.left == 0:
                    self._finish(one, state)

    def _fork(self, reply: Reply) -> list[Reply]:
        """The other replies of the same turn: their sequences share every block until they write."""
        if not reply.forks:
            return []
        assert reply.sequence is not None
        children = [
            replace(reply, tokens=[*reply.tokens], forks=0, kept=False, sequence=sequence, past={*reply.past, "fork"})
            for sequence in self.cache.fork(reply.sequence, reply.forks)
        ]
        reply.forks = 0
        for child in children:
            self._run(child)
        return children

    def _finish(self, reply: Reply, state: torch.Tensor) -> None:
        assert reply.sequence is not None
        self._running.remove(reply)
        self.cache.free([reply.sequence])
        self.replies_done += 1
        past = frozenset(reply.past)
        if self.replies_done % self._verify_every == 0 or past not in (seen for _, seen in self.verified):
            dense = self._model.run_dense(reply.tokens[:-1])
            self.verified.append((float((state - dense).abs().max()), past))
        talk = reply.talk
        talk.open_replies -= 1
        if reply.kept:
            talk.history = list(reply.tokens)
        if not talk.open_replies:
            del talk.turns[0]
            if talk.turns:
                self._pause(talk)

    def _remember(self) -> None:
        layout, device = self.cache.layout, self.cache.stats().device
        live = len(self._running)
        self.moments.append(
            Moment(
                causes=bytes_by_cause(device, layout.block_bytes),
                saved=device.saved * layout.block_bytes,
                sequences=live,
                contiguous_used=sum(reply.computed for reply in self._running) * layout.token_bytes,
                contiguous_reserved=live * self.cache.manager.max_seq_len * layout.token_bytes,
            )
        )
