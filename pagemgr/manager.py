"""The block manager: every decision about blocks, and not one tensor.

    add ─► Sequence      reserve ─► Plan ─► (copy, write, attend) ─► commit, or abort
    fork · truncate · free · swap_out / swap_in ─► Transfer ─► (copy) ─► finish, or cancel

Each verb validates and plans first and changes state last, so that it either does the whole of what it was asked for
or raises and leaves everything as it was. One lock serialises the verbs. Nothing depends on time, addresses or hash
seeds: the same calls give the same block ids on every rank (a fence must answer alike on all of them for that).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from . import accelerator, checks, swapping
from .errors import InvalidInput, OutOfBlocks, OutOfSequences, SequenceTooLong, StepOrderError
from .ids import BatchTokens, LateTokens, TokenArray, Tokens, fill_in, pack_batch, pack_tokens
from .layout import NULL_BLOCK
from .native.build import DEFAULT_CACHE_DIR
from .ownership import OneProcess
from .plan import Ints, Plan, Transfer
from .pool import Fence
from .prefix import DIGEST_BYTES, Namespace, PrefixIndex
from .sequences import Batch, Prompt, Sequence, SequenceTable
from .stats import Counters, Stats
from .steps import alive_in, apply_step, commit_step, plan_step, undo_step
from .tier import Tier

DEVICE, HOST = 0, 1


@dataclass(frozen=True, slots=True)
class _StepFence:
    """Passes when the step has ended."""

    step: int
    in_flight: dict[int, Plan]

    def query(self) -> bool:
        return self.step not in self.in_flight


class _Verb(OneProcess):
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
        if reason is not None:
            self._counters.failures[reason] += 1
        self._lock.release()


_REFUSALS: dict[type[BaseException], str] = {
    OutOfBlocks: "out_of_blocks",
    OutOfSequences: "out_of_sequences",
    SequenceTooLong: "sequence_too_long",
}


class BlockManager(OneProcess):
    """Blocks, sequences and prefixes of one pool with an optional host tier.

    ``num_blocks`` and ``num_host_blocks`` include the null block of their tier; a host tier of 0 blocks means no
    swapping. ``max_seq_len`` is in tokens. ``compiled`` runs the hot loops in C++ where there is a compiler (built
    once, into ``cache_dir``); the decisions are the same without. Raises ``InvalidInput`` for sizes that cannot work.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_sequences: int = 256,
        max_seq_len: int | None = None,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        eviction: str = "lru",
        compiled: bool = True,
        cache_dir: str = DEFAULT_CACHE_DIR,
    ) -> None:
        if block_size < 1 or max_sequences < 1:
            raise InvalidInput(f"block_size={block_size} and max_sequences={max_sequences} must be at least 1")
        if num_blocks < 2 or not (num_host_blocks == 0 or num_host_blocks >= 2):
            raise InvalidInput(
                f"{num_blocks=} must be at least 2, one being the null block, {num_host_blocks=} 0 or so"
            )
        most = (num_blocks - 1) * block_size
        self.max_seq_len = most if max_seq_len is None else max_seq_len
        if not 1 <= self.max_seq_len <= most:
            raise InvalidInput(
                f"max_seq_len={max_seq_len} is not in [1, {most}], what {num_blocks - 1} blocks can hold"
            )
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        sizes = {"device": num_blocks} | ({"host": num_host_blocks} if num_host_blocks else {})
        library = accelerator.load(cache_dir) if compiled else None
        self.tiers = tuple(
            Tier(
                name,
                size,
                eviction,
                accelerator.NativeIndex(size, block_size, library) if library else PrefixIndex(size, block_size),
            )
            for name, size in sizes.items()
        )
        self.table = SequenceTable(max_sequences, -(-self.max_seq_len // block_size), tuple(sizes))
        self._accelerator = (
            accelerator.Accelerator(library, self.table, self.tiers[DEVICE], self.max_seq_len) if library else None
        )
        self.counters = Counters()
        self._in_flight: dict[int, Plan] = {}
        self._moving: list[Transfer] = []
        self._next_step = 1
        self._lock = threading.RLock()
        self._verb = _Verb(self._lock, self.tiers, self.counters)

    # Sequences ------------------------------------------------------------------------------------------------------

    def add(self, prompt: Tokens = (), namespace: Namespace | None = None) -> Sequence:
        """One sequence; see ``add_many``."""
        return self.add_many([prompt], [namespace])[0]

    def add_many(
        self, prompts: SequenceOf[Tokens], namespaces: SequenceOf[Namespace | None] | None = None
    ) -> list[Sequence]:
        """New sequences, each starting with what the prefix cache holds of its prompt in its namespace.

        ``num_cached_tokens`` of a handle is the length it starts with: whole blocks, and at least one token of the
        prompt is always left to run. The rest of the prompt is not stored: hand it to ``reserve``. A prompt may be
        empty. Raises ``OutOfSequences``, ``SequenceTooLong``, ``InvalidInput``.
        """
        packed = [pack_tokens(prompt) for prompt in prompts]
        spaces = [space or Namespace() for space in ([None] * len(packed) if namespaces is None else namespaces)]
        if len(spaces) != len(packed):
            raise InvalidInput(f"{len(packed)} prompts but {len(spaces)} namespaces")
        roots = [space.root(self.block_size) for space in spaces]
        names = [b""] * len(packed)
        if self.prefix_caching:
            hasher = self.tiers[DEVICE].index.hash
            names = [hasher(root, ids) for root, ids in zip(roots, packed, strict=True)]
        with self._verb:
            self._require_length(max((len(ids) for ids in packed), default=0))
            self.table.require(len(packed))
            return [self._add(root, Prompt(ids, chain)) for root, ids, chain in zip(roots, packed, names, strict=True)]

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
            row = int(rows[0])
            tier = self.tiers[self.table.tier[row]]
            tier.share(self.table.blocks[row, : self.table.num_blocks[row]], n)
            cached = sequence.num_cached_tokens
            return [self.table.handle(child, cached) for child in self.table.clone(row, n)]

    def truncate(self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]) -> None:
        """Cut sequences back to these lengths in tokens and give back the blocks past the cut.

        Raises ``SequenceBusy`` while steps are in flight, ``InvalidInput`` for a length beyond what is computed.
        """
        with self._verb:
            rows = self.table.rows(sequences)
            self.table.require_idle(rows, "truncate")
            target = pack_tokens(lengths).astype(np.int64)
            if len(target) != len(rows):
                raise InvalidInput(f"{len(rows)} sequences but {len(target)} lengths")
            for row, length in zip(rows.tolist(), target.tolist(), strict=True):
                if not 0 <= length <= self.table.computed[row]:
                    raise InvalidInput(f"length {length} is not in [0, {self.table.computed[row]}], what is computed")
            keep = -(-target // self.block_size)
            self._release(rows, keep, ())
            for row, kept in zip(rows.tolist(), keep.tolist(), strict=True):
                self.table.blocks[row, kept:] = NULL_BLOCK
            self.table.num_blocks[rows] = keep
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

    def lengths(self, sequences: SequenceOf[Sequence]) -> Ints:
        """Computed tokens of each sequence, int64."""
        with self._lock:
            return self.table.computed[self.table.rows(sequences)]

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
            step = self._next_step
            plan = None
            if self._accelerator is not None:
                plan = self._accelerator.reserve(step, batch.rows, batch.generations, counts, ids)
            if plan is None:
                plan = self._reserve(step, batch, counts, ids)
            self._next_step = step + 1
            self._in_flight[step] = plan
            self.counters.cow_copies += len(plan.replaced[0])
            return plan

    def commit(self, plan: Plan, tokens: LateTokens = None) -> None:
        """The step has run: its tokens count, and blocks that became full can be matched.

        ``tokens[i]`` is the ids of sequence ``i`` where it was reserved by count. Without ids (here or at
        ``reserve``) its tokens are computed but never committed, and what follows them cannot be matched either.
        Raises ``StepOrderError`` unless this is the oldest step in flight, ``InvalidInput``.
        """
        with self._verb:
            if self._in_flight.get(plan.step) is not plan or plan.step != self._oldest_in_flight():
                raise StepOrderError(
                    f"step {plan.step} cannot commit: in flight are {list(self._in_flight)}, oldest first"
                )
            alive = alive_in(plan, self.table)
            late = fill_in(plan.tokens, plan.query_start.tolist(), tokens, alive)
            ids = late if self.prefix_caching else None
            del self._in_flight[plan.step]
            duplicates = None
            if self._accelerator is not None:
                duplicates = self._accelerator.commit(plan, ids, lambda: self._fences(None))
            if duplicates is None:
                duplicates = commit_step(plan, ids, self.tiers[DEVICE], self.table, self._fences(None))
            self.counters.duplicate_blocks += duplicates
            self.counters.steps_committed += 1
            self.counters.tokens_committed += int(plan.counts[alive].sum())

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
            self.counters.steps_aborted += 1

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

    def finish(self, transfer: Transfer, after: Fence | None = None) -> None:
        """The bytes were copied, or will be by the time ``after`` passes: the sequences are in the other tier now."""
        with self._verb:
            fences = self._fences(after)
            self._end_transfer(transfer)
            swapping.finish(transfer, self.tiers, self.table, fences)
            direction = "out" if transfer.target == "host" else "in"
            self.counters.swapped_blocks[direction] += transfer.num_copied
            self.counters.swapped_sequences[direction] += len(transfer.rows)

    def cancel(self, transfer: Transfer) -> None:
        """The copy failed: the sequences stay where they were."""
        with self._verb:
            self._end_transfer(transfer)
            swapping.cancel(transfer, self.tiers, self.table)
            self.counters.swap_failures["out" if transfer.target == "host" else "in"] += 1

    # Looking --------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """One consistent snapshot."""
        with self._verb:
            return checks.snapshot(self.tiers, self.table, self._moving, self.counters, len(self._in_flight))

    def check(self) -> None:
        """Assert every invariant in O(pool + tokens). Raises ``InternalError`` and counts the violation."""
        with self._lock:
            try:
                checks.check(self.tiers, self.table, self._moving, self.prefix_caching)
            except Exception:
                self.counters.invariant_violations += 1
                raise

    # Inside ---------------------------------------------------------------------------------------------------------

    def _oldest_in_flight(self) -> int:
        return next(iter(self._in_flight), self._next_step)

    def _fences(self, after: Fence | None) -> tuple[Fence, ...]:
        if after is not None and not callable(getattr(after, "query", None)):
            raise InvalidInput(f"a fence needs a query() method, such as torch.cuda.Event has, got {after!r:.80}")
        fences: tuple[Fence, ...] = () if after is None else (after,)
        return fences + tuple(_StepFence(step, self._in_flight) for step in self._in_flight)

    def _require_length(self, length: int) -> None:
        if length > self.max_seq_len:
            raise SequenceTooLong(length, self.max_seq_len)

    def _release(self, rows: Ints, keep: Ints, fences: tuple[Fence, ...]) -> None:
        for index, tier in enumerate(self.tiers):
            here = self.table.tier[rows] == index
            if here.any():
                tier.pool.release(*self.table.leaf_first(rows[here], keep[here]), fences)

    def _add(self, root: bytes, prompt: Prompt) -> Sequence:
        device, table = self.tiers[DEVICE], self.table
        usable = max(len(prompt.tokens) - 1, 0) // self.block_size
        blocks = device.index.match(prompt.names[: usable * DIGEST_BYTES])
        row = table.create(root)
        cached = len(blocks) * self.block_size
        device.share(blocks)
        table.blocks[row, : len(blocks)] = blocks
        table.num_blocks[row] = len(blocks)
        table.reserved[row] = table.computed[row] = table.committed[row] = cached
        if self._accelerator is None and len(prompt.names) > len(blocks) * DIGEST_BYTES:
            table.prompts[row] = prompt  # compiled, to hash again is cheaper than to compare
        self.counters.prefix_query_tokens += len(prompt.tokens)
        self.counters.prefix_hit_tokens += cached
        return table.handle(row, cached)

    def _reserve(self, step: int, batch: Batch, counts: Ints, ids: TokenArray) -> Plan:
        """The specification of ``Accelerator.reserve``, and what finds the error to raise."""
        rows = self.table.rows(batch)
        self.table.require_tier(rows, DEVICE)
        self.table.require_still(rows, "reserve for")
        self._require_length(int((self.table.reserved[rows] + counts).max(initial=0)))
        plan = plan_step(step, self.tiers[DEVICE], self.table, rows, batch.generations, counts, ids)
        apply_step(plan, self.tiers[DEVICE], self.table, _StepFence(step, self._in_flight))
        return plan

    def _begin_transfer(self, sequences: SequenceOf[Sequence], source: int, target: int) -> Transfer:
        with self._verb:
            rows = self.table.rows(sequences)
            if len(self.tiers) <= HOST:
                raise InvalidInput("there is no host tier to swap with: set pool.host_blocks or pool.host_size")
            self.table.require_idle(rows, "swap")
            self.table.require_tier(rows, source)
            transfer = swapping.begin(rows, self.tiers[source], self.tiers[target], self.table)
            self._moving.append(transfer)
            return transfer

    def _end_transfer(self, transfer: Transfer) -> None:
        if not any(moving is transfer for moving in self._moving):
            raise StepOrderError("this transfer is not under way: each is finished or cancelled once")
        self._moving = [moving for moving in self._moving if moving is not transfer]
