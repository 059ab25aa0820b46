"""The hot loops of the manager in C++, where there is a compiler: ``native/pagemgr_manager.h`` through cffi.

``steps.py`` and ``prefix.py`` are the specification. What is here does the same on the same arrays, or declines, and
then the specification does it. A step is taken if every sequence has a tail of its own, or a published
one to copy, and blanks suffice: no shared tail, no eviction, no error to raise.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import cffi  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from .errors import BackendUnavailable
from .eviction import Blocks
from .ids import TokenArray
from .native.build import SOURCES, build, recipe
from .plan import Copies, Ints, Plan
from .pool import Fence, tally
from .prefix import DIGEST_BYTES, PrefixIndex
from .sequences import Batch, SequenceTable
from .steps import share_duplicates
from .tier import Tier

_log = logging.getLogger("pagemgr")


@functools.cache
def load(cache_dir: str) -> tuple[Any, Any] | None:
    """cffi's handle and the library, built first if need be; None, with one log line, where that cannot be done."""
    try:
        path = build(recipe("manager"), cache_dir)
        ffi = cffi.FFI()
        ffi.cdef((SOURCES / "pagemgr_manager.h").read_text(encoding="utf-8"))
        library = ffi.dlopen(str(path))
        found, wanted = library.pagemgr_manager_version(), library.PAGEMGR_MANAGER_VERSION
        if found != wanted:
            raise BackendUnavailable("manager", f"{path} is version {found}, not {wanted}: delete it")
    except (BackendUnavailable, OSError, AttributeError) as error:
        _log.info("the block manager runs without its compiled loops: %s", error)
        return None
    return ffi, library


class NativeIndex(PrefixIndex):
    """A prefix index in flat arrays: 32 bytes of name and two to four hash slots of 4 bytes for each block."""

    def __init__(self, num_blocks: int, block_size: int, library: tuple[Any, Any]) -> None:
        super().__init__(num_blocks, block_size)
        self._ffi, self._lib = library
        self._slots = np.full(1 << (2 * num_blocks - 1).bit_length(), -1, dtype=np.int32)
        self.struct = self._ffi.new("pagemgr_index *")
        self.struct.slots = self._ffi.from_buffer("int32_t[]", self._slots)
        self.struct.names = self._ffi.from_buffer("uint8_t[]", self.names)
        self.struct.parents = self._ffi.from_buffer("int32_t[]", self.parents)
        self.struct.mask = len(self._slots) - 1
        self.struct.groups = self._ffi.from_buffer("uint8_t[]", self.groups)
        self.struct.heads = self._ffi.from_buffer("int32_t[]", self.heads)
        self.struct.heads_mask = len(self.heads) - 1

    def hash(self, parent: bytes, tokens: TokenArray) -> bytes:
        """See ``hash_blocks``."""
        count = len(tokens) // self.block_size
        names = bytearray(count * DIGEST_BYTES)
        buffer = self._ffi.from_buffer
        self._lib.pagemgr_manager_hash(
            buffer("uint8_t[]", parent), buffer("int32_t[]", tokens), count, self.block_size, buffer("uint8_t[]", names)
        )
        return bytes(names)

    def find(self, names: bytes) -> Blocks:
        """See ``PrefixIndex.find``."""
        blocks = np.empty(len(names) // DIGEST_BYTES, dtype=np.int32)
        buffer = self._ffi.from_buffer
        self._lib.pagemgr_index_find(self.struct, buffer("uint8_t[]", names), len(blocks), buffer("int32_t[]", blocks))
        return blocks

    def publish(self, blocks: Blocks, names: bytes) -> Blocks:
        """See ``PrefixIndex.publish``."""
        kept = np.empty_like(blocks)
        buffer = self._ffi.from_buffer
        self._lib.pagemgr_index_publish(
            self.struct,
            buffer("int32_t[]", np.ascontiguousarray(blocks)),
            buffer("uint8_t[]", names),
            len(blocks),
            buffer("int32_t[]", kept),
        )
        return kept

    def forget(self, blocks: Blocks) -> None:
        """See ``PrefixIndex.forget``."""
        if len(blocks):
            ordered = self._ffi.from_buffer("int32_t[]", np.ascontiguousarray(blocks))
            self._lib.pagemgr_index_forget(self.struct, ordered, len(blocks))

    def num_published(self) -> int:
        """Names there are."""
        return int(np.count_nonzero(self._slots >= 0))


class Accelerator:
    """One manager's arrays, as the library sees them."""

    def __init__(self, library: tuple[Any, Any], table: SequenceTable, device: Tier, max_seq_len: int) -> None:
        self._ffi, self._lib = library
        self._table, self._device = table, device
        self._manager = self._ffi.new("pagemgr_manager *")
        assert isinstance(device.index, NativeIndex)
        self._manager.index = device.index.struct[0]
        pool = device.pool
        arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {
            "blocks": ("int32_t[]", table.blocks),
            "num_blocks": ("int64_t[]", table.num_blocks),
            "dropped": ("int64_t[]", table.dropped),
            "window": ("int64_t[]", table.window),
            "reserved": ("int64_t[]", table.reserved),
            "computed": ("int64_t[]", table.computed),
            "committed": ("int64_t[]", table.committed),
            "generation": ("int64_t[]", table.generation),
            "last_step": ("int64_t[]", table.last_step),
            "live": ("uint8_t[]", table.live),
            "tier": ("uint8_t[]", table.tier),
            "roots": ("uint8_t[]", table.roots),
            "refs": ("int32_t[]", pool.refs),
            "state": ("uint8_t[]", pool.state),
            "published": ("uint8_t[]", pool.published),
            "pending": ("int32_t[]", pool.pending),
            "stack": ("int32_t[]", pool.stack),
            "tokens": ("int32_t[]", device.index.tokens),
        }
        for name, (kind, array) in arrays.items():
            setattr(self._manager, name, self._ffi.from_buffer(kind, array))
        self._manager.num_rows, self._manager.width = table.blocks.shape
        self._manager.max_sequences, self._manager.max_seq_len = table.max_sequences, max_seq_len
        self._manager.block_size = device.index.block_size
        self._steps: dict[int, tuple[Any, list[Any]]] = {}

    def reserve(
        self, step: int, rows: Ints, generations: Ints, counts: Ints, tokens: TokenArray, fence: Callable[[], Fence]
    ) -> Plan | None:
        """Plan and apply a step at once; None if the specification has to. ``fence`` passes when the step has ended."""
        pool, buffer = self._device.pool, self._ffi.from_buffer
        native = self._ffi.new("pagemgr_manager_step *")
        keep = [buffer("int64_t[]", rows), buffer("int64_t[]", generations), buffer("int64_t[]", counts)]
        native.rows, native.generations, native.counts = keep
        native.num_seqs, native.step = len(rows), step
        if not self._lib.pagemgr_manager_measure(self._manager, native):
            return None
        new, free = native.num_new_blocks, pool.num_free
        if new > free:
            return None
        starts, previous = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        block_table = np.empty((len(rows), native.table_width), np.int32)
        query_start, slots = np.empty(len(rows) + 1, np.int32), np.empty(native.num_tokens, np.int64)
        native.starts, native.previous, native.block_table, native.query_start, native.slot_mapping = written = [
            buffer("int64_t[]", starts),
            buffer("int64_t[]", previous),
            buffer("int32_t[]", block_table),
            buffer("int32_t[]", query_start),
            buffer("int64_t[]", slots),
        ]
        replaced, copies = _NOTHING_REPLACED, native.num_copies
        if copies:
            replaced = np.empty(copies, np.int64), np.empty(copies, np.int32), np.empty(copies, np.int32)
            native.copied, native.fresh, native.tails = held = [
                buffer(kind, array) for kind, array in zip(_REPLACED, replaced, strict=True)
            ]
            written += held
        self._lib.pagemgr_manager_reserve(self._manager, native, free)
        self._device.note(pool.stack[free - new : free][::-1])
        pool.count_taken(new)
        if copies:
            pool.release(*tally(replaced[2]), (fence(),))
        self._steps[step] = native, keep + written
        return Plan(
            step=step,
            num_groups=len(self._table.windows),
            rows=rows,
            generations=generations,
            previous=previous,
            starts=starts,
            counts=counts,
            tokens=tokens,
            block_table=block_table,
            query_start=query_start,
            slot_mapping=slots,
            copies=_copy_on_write(self._device.name, replaced) if copies else (),
            replaced=replaced,
            demotion=None,
        )

    def commit(self, plan: Plan, ids: TokenArray | None, fences: Callable[[], tuple[Fence, ...]]) -> int | None:
        """As ``commit_step``; None if the step was not reserved here. It may be shorter than it was."""
        native, _ = self._steps.pop(plan.step, (None, None))
        if native is None:
            return None
        table, device, buffer = self._table, self._device, self._ffi.from_buffer
        native.query_start = starts = buffer("int32_t[]", plan.query_start)
        native.slot_mapping = slots = buffer("int64_t[]", plan.slot_mapping)
        room = len(plan.slot_mapping) // device.index.block_size + len(plan.rows)
        duplicates = np.empty((room, 4), dtype=np.int64)
        sealed, count = np.empty(room, dtype=np.int32), self._ffi.new("int64_t *")
        given = self._ffi.NULL if ids is None else buffer("int32_t[]", ids)
        found = self._lib.pagemgr_manager_commit(
            self._manager, native, given, buffer("int64_t[]", duplicates), buffer("int32_t[]", sealed), count
        )
        del starts, slots  # they had to live until here
        device.pool.count_sealed(count[0])
        if device.events.heard:
            device.tell_stored(sealed[: count[0]])
        if found:
            rows, columns = duplicates[:found, 0], duplicates[:found, 1]
            own, kept = (duplicates[:found, i].astype(np.int32) for i in (2, 3))
            share_duplicates(device, table, rows, columns, own, kept, fences())
        return int(found)

    def free(self, batch: Batch) -> bool:
        """End sequences that are idle on the device while no fence is pending; False if the specification has to."""
        table, pool, buffer = self._table, self._device.pool, self._ffi.from_buffer
        if pool.has_fences:
            return False
        rows = table.groups_of(batch.rows)
        cached = np.empty(int(table.num_blocks.take(rows, mode="clip").sum()), dtype=np.int32)
        released = self._ffi.new("int64_t[2]")
        found = self._lib.pagemgr_manager_free(
            self._manager,
            buffer("int64_t[]", rows),
            buffer("int64_t[]", table.spread(batch.generations)),
            len(rows),
            pool.num_free,
            buffer("int32_t[]", cached),
            released,
        )
        if found < 0:
            return False
        pool.count_released(released[0], cached[:found])
        table.vacate(rows)
        return True

    def fork(self, rows: Ints, n: int) -> list[int] | None:
        """As ``clone`` and ``share``, for a sequence that is idle on the device; None if the specification has to."""
        table, buffer = self._table, self._ffi.from_buffer
        first = table.next_rows(n)
        children = table.groups_of(np.array(first, dtype=np.int64))
        done = self._lib.pagemgr_manager_fork(
            self._manager, buffer("int64_t[]", rows), len(rows), buffer("int64_t[]", children), n
        )
        if not done:
            return None
        table.occupy(n)
        held = [table.held(row) for row in rows.tolist()]
        self._device.note(np.concatenate(held) if len(held) > 1 else held[0])
        return first

    def drop(self, plan: Plan) -> None:
        """The step was aborted."""
        self._steps.pop(plan.step, None)


_NO_ROWS: Ints = np.zeros(0, dtype=np.int64)
_NO_BLOCKS: Blocks = np.zeros(0, dtype=np.int32)
_NOTHING_REPLACED = (_NO_ROWS, _NO_BLOCKS, _NO_BLOCKS)
_REPLACED = ("int64_t[]", "int32_t[]", "int32_t[]")


def _copy_on_write(tier: str, replaced: tuple[Ints, Blocks, Blocks]) -> tuple[Copies]:
    _, fresh, tails = replaced
    return (Copies(tier, tier, np.stack([tails, fresh], axis=1)),)
