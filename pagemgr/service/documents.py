"""The JSON that the API answers with. Numbers, names of tiers and states, and settings: nothing that a user said or is.

stats       the pool in figures: utilisation, hit ratio, bytes by cause, every counter
tiers       each tier: blocks by state, bytes by cause, how it is
blocks      the block map, in as many cells as asked for
sequences   the largest sequences, and the prefixes that several share
events      the newest events of the manager's log
config      the settings in force
history     what the curves over time are drawn from
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pagemgr import __version__
from pagemgr.errors import InvalidInput
from pagemgr.metrics import bytes_by_cause

from .reader import Reader
from .summary import block_map, health, largest_sequences, num_sequences, shared_prefixes

Document = dict[str, Any]
Query = Mapping[str, str]
MOST_CELLS = 16_384
MOST_SEQUENCES = 1_000


def stats(reader: Reader, _: Query) -> Document:
    """The pool in figures. Bytes are those of the device tier and sum to its capacity."""
    cache, look = reader.cache, reader.look()
    stats, block_bytes = look.dump.stats, look.dump.block_bytes
    device = stats.device
    return {
        "time": look.time,
        "version": __version__,
        "pool": cache.config.metrics.pool,
        "backend": cache.backend.name,
        "device": str(cache.device),
        "eviction": cache.config.eviction.policy,
        "block_size": look.dump.block_size,
        "block_bytes": block_bytes,
        "max_seq_len": cache.manager.max_seq_len,
        "capacity_bytes": device.num_blocks * block_bytes,
        "available_bytes": (device.free + device.cached) * block_bytes,
        "saved_bytes": device.saved * block_bytes,
        "bytes": bytes_by_cause(device, block_bytes),
        "utilization": device.utilization,
        "hit_ratio": stats.hit_ratio,
        "sequences": stats.sequences,
        "max_sequences": stats.max_sequences,
        "steps_in_flight": stats.steps_in_flight,
        "counters": asdict(stats.counters),
    }


def tiers(reader: Reader, _: Query) -> Document:
    """Each tier of the pool."""
    dump = reader.look().dump
    return {
        "tiers": [
            {
                **asdict(tier),
                "utilization": tier.utilization,
                "health": health(tier),
                "capacity_bytes": tier.num_blocks * dump.block_bytes,
                "saved_bytes": tier.saved * dump.block_bytes,
                "bytes": bytes_by_cause(tier, dump.block_bytes),
            }
            for tier in dump.stats.tiers
        ]
    }


def blocks(reader: Reader, query: Query) -> Document:
    """The block map of every tier, in at most ``cells`` cells each."""
    cells = _number(query, "cells", 4096, MOST_CELLS)
    return {"tiers": [block_map(tier, cells) for tier in reader.look().dump.tiers]}


def sequences(reader: Reader, query: Query) -> Document:
    """The ``limit`` largest sequences, and as many prefixes that several sequences share."""
    limit, dump = _number(query, "limit", 20, MOST_SEQUENCES), reader.look().dump
    return {
        "total": num_sequences(dump),
        "largest": largest_sequences(dump, limit),
        "prefixes": shared_prefixes(dump, limit),
    }


def events(reader: Reader, _: Query) -> Document:
    """Runs of events since somebody began to ask for them, newest first."""
    return {"events": reader.listener.runs()}


def config(reader: Reader, _: Query) -> Document:
    """Every setting; secrets are masked."""
    return reader.cache.config.model_dump(mode="json")


def history(reader: Reader, _: Query) -> Document:
    """Points of the last quarter of an hour, oldest first."""
    return {"points": reader.history()}


DOCUMENTS: dict[str, Callable[[Reader, Query], Document]] = {
    function.__name__: function for function in (stats, tiers, blocks, sequences, events, config, history)
}


def _number(query: Query, name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    # isdecimal takes digits of every script, which int would read as well; a query has no business with them
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise InvalidInput(f"{name} must be a whole number from 1 to {most}, got {text!r:.80}")
    return int(text)
