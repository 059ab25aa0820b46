"""The block manager: every decision about blocks, and not one tensor.

    add ─► Sequence      reserve ─► Plan ─► (copy, write, attend) ─► commit, or abort
    fork · truncate · free · pin
    swap_out / swap_in ─► Transfer ─► (copy) ─► finish, or cancel      admit ─► Promotion, likewise

Each verb validates and plans first and changes state last, so that it either does the whole of what it was asked for
or raises and leaves everything as it was. One lock serialises the verbs. Nothing depends on time, addresses or hash
seeds: the same calls give the same block ids on every rank (a fence must answer alike on all of them for that).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import partial

import numpy as np

from . import swapping
from .admission import Arrival, Match, admit, blocks_below
from .assembly import DEVICE, HOST, Assembly
from .errors import InvalidInput, OutOfBlocks, SequenceTooLong, StepOrderError
from .eviction import Blocks
from .ids import BatchTokens, LateTokens, TokenArray, Tokens, fill_in, pack_batch, pack_tokens
from .pins import Pin
from .plan import Ints, Plan, Promotion, Transfer
from .pool import Fence
from .prefix import Namespace
from .second_level import SecondLevel
from .sequences import Batch, Sequence
from .steps import (
    StepFence,
    accepted_counts,
    alive_in,
    apply_step,
    commit_step,
    leave_windows,
    plan_step,
    shorten_step,
    undo_step,
)  # fmt: skip

_NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


class BlockManager(Assembly):
    """Blocks, sequences and prefixes of one pool with an optional host tier.

    ``num_blocks`` and ``num_host_blocks`` include the null block of their tier; a host tier of 0 blocks means no
    swapping. ``max_seq_len`` is in tokens. ``windows`` has an entry for each layer group: the tokens that its layers
    see, None for all; a sequence has a row for each group, and the last ``rollback`` tokens that it ran can be cut.
    ``watermark`` blocks are left to running sequences when one is added, an owner may pin ``pin_quota`` blocks, and
    ``host_cache`` ("off", "inclusive", "exclusive") says whether evicted blocks go down to the host, and stay there
    when they come up. ``partial_hits`` reuses the beginning of a block by copy, ``verify_hits`` compares token ids and
    not names alone, ``secret`` keys the names. ``debug`` is how closely blocks are watched, see ``watch.py``.
    ``compiled`` runs the hot loops in C++ where there is a compiler (built once, into ``cache_dir``); the decisions
    are the same without. Raises ``InvalidInput`` for sizes that cannot work.
    """

    # Sequences ------------------------------------------------------------------------------------------------------

    def add(self, prompt: Tokens = (), namespace: Namespace | None = None) -> Sequence:
        """One sequence; see ``add_many``."""
        return self.add_many([prompt], [namespace])[0]

    def add_many(
        self, prompts: SequenceOf[Tokens], namespaces: SequenceOf[Namespace | None] | None = None
    ) -> list[Sequence]:
        """New sequences, each starting with what the device holds of its prompt in its namespace.

        ``num_cached_tokens`` of a handle is the length it starts with; at least one token of the prompt is always left
        to run. The rest of the prompt is not stored: hand it to ``reserve``. A prompt may be empty. Raises
        ``OutOfSequences``, ``SequenceTooLong``, ``OutOfBlocks`` if what the prompts still need would not leave the
        watermark, ``InvalidInput``.
        """
        arrivals = self._arrivals(prompts, namespaces)
        with self._verb:
            return self._add(arrivals)

    def admit(
        self, prompts: SequenceOf[Tokens], namespaces: SequenceOf[Namespace | None] | None = None
    ) -> tuple[list[Sequence], Promotion | None]:
        """As ``add_many``, with what the host cache holds as well, which has to come up first.

        If there is a promotion, execute its copies and ``finish`` it before the sequences are used, or ``cancel`` it,
        which ends them. Where the device has no room for that, its own hits are taken alone.
        """
        arrivals = self._arrivals(prompts, namespaces)
        with self._verb:
            if self.second is not None:
                matches = [self._find(arrival, self.tiers) for arrival in arrivals]
                if len(blocks_below(matches)):
                    self._require_admissible(arrivals, matches)
                    try:
                        return self._promote(self.second, arrivals, matches)
                    except OutOfBlocks:
                        pass  # besides the device's own hits there is too little
            return self._add(arrivals), None

    def fork(self, sequence: Sequence, n: int = 1) -> list[Sequence]:
        """``n`` sequences with the same content and the same blocks; whoever writes to a shared block copies it first.

        Raises ``OutOfSequences``, and ``SequenceBusy`` while steps are in flight: their slots are not written yet.
        """
        if n < 1:
            raise InvalidInput(f"n must be at least 1, got {n}")
        with self._verb:
            rows = self.table.rows([sequence])
            self.table.require_idle(rows, "fork")
            self.table.require(n)
            tier = self.tiers[self.table.tier[rows[0]]]
            children = self._accelerator.fork(rows, n) if self._accelerator is not None else None
            if children is None:
                held = [self.table.held(row) for row in rows.tolist()]
                tier.share(np.concatenate(held) if len(held) > 1 else held[0], n)
                children = self.table.clone(int(rows[0]), n)
            return [self.table.handle(child, sequence.num_cached_tokens) for child in children]

    def truncate(self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]) -> None:
        """Cut sequences back to these lengths in tokens and give back the blocks past the cut.

        Raises ``SequenceBusy`` while steps are in flight, ``InvalidInput`` for a length beyond what is computed, or
        one from which a layer group with a window could not go on, as its blocks before that are gone.
        """
        with self._verb:
            rows = self.table.rows(sequences)
            self.table.require_idle(rows, "truncate")
            packed = pack_tokens(lengths).astype(np.int64)
            if len(packed) != len(sequences):
                raise InvalidInput(f"{len(sequences)} sequences but {len(packed)} lengths")
            target = self.table.spread(packed)
            self.table.require_lengths(rows, target, self.block_size)
            keep = -(-target // self.block_size)
            self._release(rows, keep, ())
            self.table.cut(rows, keep)
            self.table.reserved[rows] = self.table.computed[rows] = target
            self.table.committed[rows] = np.minimum(self.table.committed[rows], target)

    def free(self, sequences: SequenceOf[Sequence] | Batch, after: Fence | None = None) -> None:
        """End sequences. Their blocks are reused once ``after`` has passed and the steps now in flight have ended.

        Steps in flight may name a freed sequence; committing them skips it. Raises ``StaleSequence``,
        ``SequenceBusy`` while a sequence is moving between tiers.
        """
        batch = sequences if isinstance(sequences, Batch) else Batch(sequences)
        with self._verb:
            fences = self._fences(after)
            if self._accelerator is not None and not fences and self._accelerator.free(batch):
                return
            rows = self.table.rows(batch)
            self.table.require_still(rows, "free")
            self._release(rows, np.zeros_like(rows), fences)
            self.table.destroy(rows)

    # Steps ----------------------------------------------------------------------------------------------------------

    def reserve(self, sequences: SequenceOf[Sequence] | Batch, tokens: BatchTokens) -> Plan:
        """Slots for the new tokens of a batch, for all of it or none.

        ``tokens[i]`` is the new token ids of sequence ``i``, or how many there will be (the ids then come at
        ``commit``); an integer array ``[num_seqs, k]`` gives ``k`` ids for each. Several steps may be in flight, also
        of one sequence. Raises ``OutOfBlocks``, ``SequenceTooLong``, ``WrongTier``, ``SequenceBusy``,
        ``StaleSequence``, ``InvalidInput``.
        """
        batch = sequences if isinstance(sequences, Batch) else Batch(sequences)
        with self._verb:
            counts, ids = pack_batch(tokens, len(batch), self.max_seq_len)
            counts, ids = self.table.spread(counts), self.table.spread(ids)
            generations = self.table.spread(batch.generations)
            step = self._next_step
            plan = None
            if self._accelerator is not None:
                rows = self.table.groups_of(batch.rows)
                fence = partial(StepFence, step, self._in_flight)
                plan = self._accelerator.reserve(step, rows, generations, counts, ids, fence)
            if plan is None:
                plan = self._reserve(step, batch, generations, counts, ids)
            self._next_step = step + 1
            self._in_flight[step] = plan
            self.counters.cow_copies += len(plan.replaced[0])
            return plan

    def commit(self, plan: Plan, tokens: LateTokens = None, accepted: SequenceOf[int] | None = None) -> None:
        """The step has run: its tokens count, and blocks that became full can be matched.

        ``tokens[i]`` is the ids of sequence ``i`` where it was reserved by count. Without ids (here or at
        ``reserve``) its tokens are computed but never committed, and what follows them cannot be matched either.
        ``accepted[i]``, at least 1, is how many of the tokens of sequence ``i`` count, drafts being verified: the rest
        is rolled back. Raises ``StepOrderError`` unless this is the oldest step in flight, ``SequenceBusy`` if drafts
        are refused on which a later step builds, ``InvalidInput``.
        """
        with self._verb:
            if self._in_flight.get(plan.step) is not plan or plan.step != self._oldest_in_flight():
                raise StepOrderError(
                    f"step {plan.step} cannot commit: in flight are {list(self._in_flight)}, oldest first"
                )
            n, alive = plan.num_seqs, alive_in(plan, self.table)
            kept = accepted_counts(plan, accepted, alive, self.table)
            known = fill_in(plan.tokens[: plan.num_tokens], plan.query_start[: n + 1].tolist(), tokens, alive[:n])
            known = self.table.spread(known)
            del self._in_flight[plan.step]
            if kept is not None:
                self.counters.draft_tokens += int((plan.counts - kept)[:n].sum())
                plan, known = shorten_step(plan, kept, known, self.tiers[DEVICE], self.table, self._fences(None))
            ids = known if self.prefix_caching else None
            duplicates = None
            if self._accelerator is not None:
                duplicates = self._accelerator.commit(plan, ids, lambda: self._fences(None))
            if duplicates is None:
                duplicates = commit_step(plan, ids, self.tiers[DEVICE], self.table, self._fences(None))
            if any(self.table.windows):
                leave_windows(plan.rows[alive], self.tiers[DEVICE], self.table, self.rollback, self._fences(None))
            if self.second is not None and plan.demotion is not None:
                self.second.settle(plan.demotion)
                self.counters.demoted_blocks += len(plan.demotion.blocks)
            self.counters.duplicate_blocks += duplicates
            self.counters.steps_committed += 1
            self.counters.tokens_committed += int(plan.counts[:n][alive[:n]].sum())

    def abort(self, plan: Plan) -> None:
        """The step will not count: its sequences are as before ``reserve``.

        What it evicted from the prefix cache stays evicted. Raises ``StepOrderError`` if it is not in flight, or if a
        later step of one of its sequences still is.
        """
        with self._verb:
            alive = alive_in(plan, self.table)
            newest = self.table.last_step[plan.rows[alive]] == plan.step
            if self._in_flight.get(plan.step) is not plan or not newest.all():
                raise StepOrderError(
                    f"step {plan.step} cannot abort: in flight are {list(self._in_flight)}; abort later ones first"
                )
            del self._in_flight[plan.step]
            if self._accelerator is not None:
                self._accelerator.drop(plan)
            undo_step(plan, self.tiers[DEVICE], self.table, self._oldest_in_flight())
            if self.second is not None and plan.demotion is not None:
                self.second.drop(plan.demotion)
            self.counters.steps_aborted += 1

    # Pins -----------------------------------------------------------------------------------------------------------

    def pin(self, sequence: Sequence, owner: str, length: int | None = None, until: float | None = None) -> Pin:
        """Keep the full blocks of a sequence's first ``length`` tokens (all of it unless given) from eviction.

        The pin outlives the sequence, until ``unpin`` or an ``expire`` with a time of ``until`` or later. Raises
        ``PinQuotaExceeded``, ``WrongTier``, ``SequenceBusy``, ``InvalidInput``.
        """
        with self._verb:
            rows = self.table.rows([sequence])
            self.table.require_tier(rows, DEVICE)
            self.table.require_still(rows, "pin")
            known = int(self.table.committed[rows[0]])
            wanted = known if length is None else length
            if not 0 <= wanted <= known:
                raise InvalidInput(f"length {length} is not in [0, {known}], what is committed")
            full = wanted // self.block_size
            held = [self.table.blocks[row, self.table.dropped[row] : full].copy() for row in rows.tolist()]
            blocks = np.concatenate(held)
            self.pins.require(owner, len(blocks))
            self.tiers[DEVICE].share(blocks)
            return self.pins.add(owner, full * self.block_size, until, blocks)

    def unpin(self, pin: Pin) -> None:
        """End a pin: its blocks can be evicted once no sequence holds them. Raises ``StalePin``."""
        with self._verb:
            self.pins.remove(pin)
            self.tiers[DEVICE].pool.release(pin.blocks[::-1])

    def expire(self, now: float) -> int:
        """End the pins whose time has come, on the clock that ``until`` was given by; returns how many."""
        with self._verb:
            ended = self.pins.ended(now)
            for pin in ended:
                self.unpin(pin)
            return len(ended)

    # Tiers ----------------------------------------------------------------------------------------------------------

    def swap_out(self, sequences: SequenceOf[Sequence]) -> Transfer:
        """Begin moving sequences to the host tier: execute the copies, then ``finish`` (or ``cancel``).

        Blocks that several of them share, or that the host already holds, are copied once or not at all. Raises
        ``OutOfBlocks`` (of the host), ``WrongTier``, ``SequenceBusy``.
        """
        return self._begin_transfer(sequences, DEVICE, HOST)

    def swap_in(self, sequences: SequenceOf[Sequence]) -> Transfer:
        """Begin moving sequences back to the device; as ``swap_out``."""
        return self._begin_transfer(sequences, HOST, DEVICE)

    def finish(self, moved: Transfer | Promotion, after: Fence | None = None) -> None:
        """The bytes were copied, or will be by the time ``after`` passes: the sequences can be used."""
        with self._verb:
            fences = self._fences(after)
            self._end_move(moved)
            if moved.demotion is not None and self.second is not None:
                self.second.settle(moved.demotion)
                self.counters.demoted_blocks += len(moved.demotion.blocks)
            if isinstance(moved, Promotion):
                assert self.second is not None
                self.second.finish(moved, self.table, fences)
                self.counters.promoted_blocks += moved.num_copied
                return
            give_up = self.second.give_up if self.second is not None and moved.target == "device" else _keep
            swapping.finish(moved, self.tiers, self.table, fences, give_up)
            direction = "out" if moved.target == "host" else "in"
            self.counters.swapped_blocks[direction] += moved.num_copied
            self.counters.swapped_sequences[direction] += len(moved.rows) // len(self.table.windows)

    def cancel(self, moved: Transfer | Promotion) -> None:
        """The copy failed: swapped sequences stay where they were, admitted ones end."""
        with self._verb:
            self._end_move(moved)
            if moved.demotion is not None and self.second is not None:
                self.second.drop(moved.demotion)
            if isinstance(moved, Promotion):
                assert self.second is not None
                self.second.cancel(moved, self.table)
                self.counters.promotion_failures += 1
                return
            swapping.cancel(moved, self.tiers, self.table)
            self.counters.swap_failures["out" if moved.target == "host" else "in"] += 1

    def clear(self) -> int:
        """Forget every cached block that nobody holds or has pinned, in all tiers; returns how many that were."""
        with self._verb:
            cleared = sum(tier.clear() for tier in self.tiers)
            self.counters.cleared_blocks += cleared
            return cleared

    # Inside ---------------------------------------------------------------------------------------------------------

    def _add(self, arrivals: list[Arrival]) -> list[Sequence]:
        matches = [self._find(arrival, self.tiers[:1]) for arrival in arrivals]
        self._require_admissible(arrivals, matches)
        self._count_hits(arrivals, matches)
        keep = self._accelerator is None  # compiled, to hash again is cheaper than to compare
        device = self.tiers[DEVICE]
        return [
            admit(match, arrival, device, self.table, keep) for arrival, match in zip(arrivals, matches, strict=True)
        ]

    def _promote(
        self, second: SecondLevel, arrivals: list[Arrival], matches: list[Match]
    ) -> tuple[list[Sequence], Promotion]:
        sequences, promotion = second.promote(matches, arrivals, self.table, self._accelerator is None)
        self._count_hits(arrivals, matches)
        self._moving.append(promotion)
        return sequences, promotion

    def _reserve(self, step: int, batch: Batch, generations: Ints, counts: Ints, ids: TokenArray) -> Plan:
        """The specification of ``Accelerator.reserve``, and what finds the error to raise."""
        table, device = self.table, self.tiers[DEVICE]
        rows = table.rows(batch)
        table.require_tier(rows, DEVICE)
        table.require_still(rows, "reserve for")
        longest = int((table.reserved[rows] + counts).max(initial=0))
        if longest > self.max_seq_len:
            raise SequenceTooLong(longest, self.max_seq_len)
        plan = plan_step(step, device, table, rows, generations, counts, ids, self.second)
        if plan.demotion is not None and self.second is not None:
            self.second.begin(plan.demotion)
        apply_step(plan, device, table, StepFence(step, self._in_flight))
        return plan

    def _begin_transfer(self, sequences: SequenceOf[Sequence], source: int, target: int) -> Transfer:
        with self._verb:
            rows = self.table.rows(sequences)
            if len(self.tiers) <= HOST:
                raise InvalidInput("there is no host tier to swap with: set pool.host_blocks or pool.host_size")
            self.table.require_idle(rows, "swap")
            self.table.require_tier(rows, source)
            demote = self.second.demote if self.second is not None and target == DEVICE else _lose
            transfer = swapping.begin(rows, self.tiers[source], self.tiers[target], self.table, demote)
            self._moving.append(transfer)
            return transfer

    def _end_move(self, moved: Transfer | Promotion) -> None:
        if not any(moving is moved for moving in self._moving):
            raise StepOrderError("this transfer is not under way: each is finished or cancelled once")
        self._moving = [moving for moving in self._moving if moving is not moved]


def _lose(fresh: Blocks) -> None:
    """What is evicted is gone."""


def _keep(blocks: Blocks, times: Ints | int) -> None:
    """What moved stays cached where it was."""
