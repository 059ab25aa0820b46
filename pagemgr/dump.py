"""What a pool holds, as data: copied under the manager's lock, to be looked at, or written to a file and read later.

Token ids, names of prefixes (which are hashes of token ids), namespaces and salts stay behind: who has a dump knows how
large things are and who shares what, and nothing of what anybody said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from .errors import InvalidInput
from .eviction import Blocks
from .layout import NULL_BLOCK
from .pool import CACHED, FENCED, FREE, FULL, NULL, OPEN, BlockState
from .sequences import IDLE
from .stats import Stats

if TYPE_CHECKING:
    from .manager import BlockManager

FORMAT = "pagemgr dump 1"
NAMED = 8
"""Blocks that a problem names at most."""


@dataclass(frozen=True, slots=True)
class TierDump:
    """The blocks of one tier; arrays are ``[num_blocks]`` unless they say otherwise."""

    name: str
    state: npt.NDArray[np.uint8]
    """``BlockState`` of each block."""
    refs: npt.NDArray[np.int32]
    pending: npt.NDArray[np.int32]
    """Fences that each block waits for."""
    published: npt.NDArray[np.bool_]
    blanks: Blocks
    """The stack of free blocks, last one next."""
    held: Blocks
    """Blocks that pins, transfers and steps hold besides the sequences, once for each reference."""


@dataclass(frozen=True, slots=True)
class SequenceDump:
    """One live sequence in one layer group: a row of the block table. Lengths in tokens."""

    row: int
    """Of the sequence: its row in group 0."""
    group: int
    generation: int
    tier: str
    reserved: int
    computed: int
    committed: int
    last_step: int
    """Newest step in flight, 0 for none, -1 while it moves between tiers."""
    dropped: int
    """Blocks that left the group's window and were given back."""
    blocks: Blocks
    """Those that follow."""


@dataclass(frozen=True, slots=True)
class Dump:
    """A pool at one instant."""

    block_size: int
    block_bytes: int
    """0 where only the manager was there to ask, which knows no bytes."""
    windows: tuple[int, ...]
    """By layer group: tokens that its layers see, 0 for all."""
    stats: Stats
    tiers: tuple[TierDump, ...]
    sequences: tuple[SequenceDump, ...]
    """Those of group 0 first, then those of group 1 and so on."""


def take(manager: BlockManager, block_bytes: int = 0) -> Dump:
    """A consistent copy. Holds the lock for as long as copying 14 bytes a block and 4 a table entry takes."""
    with manager._lock:
        table, held = manager.table, manager._held()
        return Dump(
            block_size=manager.block_size,
            block_bytes=block_bytes,
            windows=tuple(window or 0 for window in table.windows),
            stats=manager.stats(),
            tiers=tuple(
                TierDump(
                    name=tier.name,
                    state=tier.pool.state.copy(),
                    refs=tier.pool.refs.copy(),
                    pending=tier.pool.pending.copy(),
                    published=tier.pool.published.copy(),
                    blanks=tier.pool.stack[: tier.pool.num_free].copy(),
                    held=held[tier.name],
                )
                for tier in manager.tiers
            ),
            sequences=tuple(
                SequenceDump(
                    row=row % table.max_sequences,
                    group=row // table.max_sequences,
                    generation=int(table.generation[row]),
                    tier=manager.tiers[int(table.tier[row])].name,
                    reserved=int(table.reserved[row]),
                    computed=int(table.computed[row]),
                    committed=int(table.committed[row]),
                    last_step=int(table.last_step[row]),
                    dropped=int(table.dropped[row]),
                    blocks=table.held(row).copy(),
                )
                for row in np.flatnonzero(table.live).tolist()
            ),
        )


# As JSON ------------------------------------------------------------------------------------------------------------


def to_document(dump: Dump) -> dict[str, Any]:
    """The dump as what ``json`` can write."""
    return {
        "format": FORMAT,
        "block_size": dump.block_size,
        "block_bytes": dump.block_bytes,
        "windows": list(dump.windows),
        "stats": asdict(dump.stats),
        "tiers": [_plain(tier) for tier in dump.tiers],
        "sequences": [_plain(sequence) for sequence in dump.sequences],
    }


def from_document(document: object) -> Dump:
    """What ``to_document`` gave, read back. Raises ``InvalidInput`` that says what is wrong with it."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise InvalidInput(f"not a dump of this version: its format must be {FORMAT!r}, got {found!r:.80}")
    try:
        return Dump(
            block_size=_whole(document, "block_size"),
            block_bytes=_whole(document, "block_bytes"),
            windows=tuple(map(int, document["windows"])),
            stats=TypeAdapter(Stats).validate_python(document["stats"]),
            tiers=tuple(_tier(tier) for tier in document["tiers"]),
            sequences=tuple(_sequence(sequence) for sequence in document["sequences"]),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("stats", *first["loc"])))
        raise InvalidInput(f"the dump is damaged: {where}: {first['msg']}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"the dump is damaged: {type(error).__name__}: {error}") from None


def _plain(part: TierDump | SequenceDump) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _tier(document: Mapping[str, Any]) -> TierDump:
    state = np.array(document["state"], dtype=np.uint8)
    tier = TierDump(
        name=str(document["name"]),
        state=state,
        refs=np.array(document["refs"], dtype=np.int32),
        pending=np.array(document["pending"], dtype=np.int32),
        published=np.array(document["published"], dtype=np.bool_),
        blanks=np.array(document["blanks"], dtype=np.int32),
        held=np.array(document["held"], dtype=np.int32),
    )
    for name in ("state", "refs", "pending", "published"):
        if (shape := getattr(tier, name).shape) != (len(state),):
            raise InvalidInput(f"tier {tier.name}: {name} must have {len(state)} entries, as state has, got {shape}")
    if state.max(initial=0) >= len(BlockState):
        raise InvalidInput(f"tier {tier.name}: a state must be below {len(BlockState)}, got {state.max()}")
    return tier


def _sequence(document: Mapping[str, Any]) -> SequenceDump:
    numbers = {
        field.name: _whole(document, field.name)
        for field in fields(SequenceDump)
        if field.name not in ("tier", "blocks")
    }
    return SequenceDump(tier=str(document["tier"]), blocks=np.array(document["blocks"], dtype=np.int32), **numbers)


def _whole(document: Mapping[str, Any], name: str) -> int:
    value = document[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInput(f"{name} must be a whole number, got {value!r:.80}")
    return value


# What is wrong with it ----------------------------------------------------------------------------------------------


def problems(dump: Dump) -> list[str]:
    """Every law that the dump breaks, as a sentence that names what breaks it; none in a sound pool.

    The same laws as ``BlockManager.check``, but for those that need token ids and names.
    """
    return [
        *(problem for tier in dump.tiers for problem in _of_tier(dump, tier)),
        *(problem for sequence in dump.sequences for problem in _of_sequence(dump, sequence)),
    ]


def _of_tier(dump: Dump, tier: TierDump) -> Iterator[str]:
    size, state, refs = len(tier.state), tier.state, tier.refs
    here = [sequence.blocks for sequence in dump.sequences if sequence.tier == tier.name]
    named = np.concatenate([*here, tier.held, np.zeros(0, dtype=np.int32)])
    inside = (named >= 0) & (named < size)
    if not inside.all():
        yield f"{tier.name}: tables name blocks that do not exist: {_some(named[~inside])} of {size}"
    owners = np.bincount(named[inside], minlength=size)
    owners[NULL_BLOCK] = 0  # pads
    for block in np.flatnonzero(refs != owners)[:NAMED].tolist():
        yield f"{tier.name}: block {block} counts {refs[block]} references, but {owners[block]} table entries name it"
    if size == 0 or state[NULL_BLOCK] != NULL or (state == NULL).sum() != 1:
        yield f"{tier.name}: block {NULL_BLOCK} must be the one null block, got {_some(np.flatnonzero(state == NULL))}"
    counted = {kind.name: int((state == kind).sum()) for kind in BlockState}
    for stats in dump.stats.tiers:
        for name, count in counted.items():
            if stats.name == tier.name and getattr(stats, name) != count:
                yield f"{tier.name}: {getattr(stats, name)} blocks are counted as {name}, {count} are"
    owned = (state == OPEN) | (state == FULL)
    blank = np.zeros(size, dtype=np.bool_)
    blank[tier.blanks[(tier.blanks >= 0) & (tier.blanks < size)]] = True
    laws = (
        ("have references, but are neither open nor full", (refs > 0) & ~owned),
        ("are open or full without a reference", (refs <= 0) & owned),
        ("are free, but not on the free stack", (state == FREE) & ~blank),
        ("are on the free stack, but not free", (state != FREE) & blank),
        ("are full or cached, but not published", ((state == FULL) | (state == CACHED)) & ~tier.published),
        ("are free or open, but published", ((state == FREE) | (state == OPEN)) & tier.published),
        ("are fenced, but wait for no fence", (state == FENCED) & (tier.pending <= 0)),
    )
    for law, broken in laws:
        if broken.any():
            yield f"{tier.name}: {int(broken.sum())} blocks {law}: {_some(np.flatnonzero(broken))}"


def _of_sequence(dump: Dump, one: SequenceDump) -> Iterator[str]:
    if not 0 <= one.group < len(dump.windows):
        yield f"row {one.row}: is in a layer group that does not exist: {one.group}"
        return
    who = f"row {one.row}" + (f", group {one.group}" if len(dump.windows) > 1 else "")
    if not 0 <= one.committed <= one.computed <= one.reserved:
        yield f"{who}: committed {one.committed} ≤ computed {one.computed} ≤ reserved {one.reserved} does not hold"
    needed = -(-one.reserved // dump.block_size) - one.dropped
    if len(one.blocks) != needed:
        yield f"{who}: has {len(one.blocks)} blocks, {one.reserved} tokens need {needed}"
    if one.dropped * dump.block_size > (one.computed if dump.windows[one.group] else 0):
        yield f"{who}: gave back {one.dropped} blocks, more than left a window of {dump.windows[one.group]} tokens"
    if (one.blocks == NULL_BLOCK).any():
        yield f"{who}: names the null block"
    if len(np.unique(one.blocks)) != len(one.blocks):
        yield f"{who}: names a block twice"
    if one.last_step == IDLE and one.computed != one.reserved:
        yield f"{who}: {one.reserved - one.computed} tokens are reserved, but no step is in flight"
    if one.tier not in {tier.name for tier in dump.tiers}:
        yield f"{who}: is in a tier that does not exist: {one.tier!r:.80}"


def _some(blocks: npt.NDArray[Any]) -> str:
    more = ", …" if len(blocks) > NAMED else ""
    return ", ".join(map(str, blocks[:NAMED].tolist())) + more
