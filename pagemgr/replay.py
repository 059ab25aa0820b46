"""Replays a trace on the real block manager, one request at a time, from a cold cache.

A request is added (prefix match), run in one step (the rest of its prompt, then its output), and freed; its blocks
stay cached until they are evicted. The last output token is sampled but never run, so it has no K/V.

With data, every block has real contents: K holds the token and V the position of each slot, written by the backend and
moved by the storage, and every hit and every move is compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from .backends import KVLayer
from .cache import PagedKVCache, Step
from .config import Config, EvictionConfig, ModelConfig, PoolConfig, PrefixConfig
from .errors import InternalError
from .ids import TokenArray
from .manager import BlockManager
from .sequences import Sequence as Handle
from .stats import Stats
from .traces import Request, TokenSource


@dataclass(frozen=True, slots=True)
class Sample:
    """Blocks by state while the request at ``timestamp`` ran."""

    timestamp: float
    used: int
    cached: int
    free: int
    waste_slots: int
    """Slots of used blocks without a token."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a trace did to a pool. Tokens and slots, not bytes: the trace knows no model."""

    requests: int
    skipped: int
    """Requests larger than the whole pool."""
    block_size: int
    usable_blocks: int
    num_groups: int
    longest: int
    """Tokens that the trace's longest request runs: what a contiguous allocation has to keep for every request."""
    held_slots: int
    """Slots that the requests held, summed over requests."""
    held_tokens: int
    """Those of them that held a token."""
    uniform_slots: int
    """Slots that they would have held if every layer kept every token."""
    compared_tokens: int
    """Tokens whose bytes were compared, with data."""
    samples: tuple[Sample, ...]
    stats: Stats
    """Of the manager, at the end."""

    @property
    def waste_ratio(self) -> float:
        """Share of the held slots that held no token."""
        return 1 - self.held_tokens / max(self.held_slots, 1)

    @property
    def contiguous_slots(self) -> int:
        """Slots that one allocation of the longest length for each request would have held, summed over requests."""
        return (self.requests - self.skipped) * self.longest * self.num_groups


class _Contents:
    """Real bytes behind the manager's decisions."""

    def __init__(self, num_blocks: int, block_size: int, policy: str) -> None:
        pool = PoolConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            host_blocks=num_blocks,
            max_sequences=1,
            max_seq_len=(num_blocks - 1) * block_size,
        )
        model = ModelConfig(num_layers=1, num_kv_heads=1, head_dim=1)
        self.cache = PagedKVCache(
            Config(
                model=model,
                pool=pool,
                prefix=PrefixConfig(partial_hits=False),
                eviction=EvictionConfig(policy=policy),
                device="cpu",
            )
        )
        self.compared = 0

    def write(self, step: Step, tokens: TokenArray, start: int) -> None:
        """K and V of ``tokens``, the first of which stands at position ``start``."""
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        key, value = (torch.from_numpy(array).view(torch.float32).view(-1, 1, 1) for array in (tokens, positions))
        self.cache.backend.write_kv(key, value, self.cache.storage.layers[0], step.batches[0].slot_mapping)

    def move(self, sequence: Handle, tokens: TokenArray) -> None:
        """To the host and back, comparing on both sides."""
        self.cache.swap_out([sequence])
        self.compare(sequence, tokens)
        self.cache.swap_in([sequence])
        self.compare(sequence, tokens)

    def compare(self, sequence: Handle, tokens: TokenArray) -> None:
        """The sequence's blocks, wherever they are, hold exactly these tokens at these positions."""
        table = self.cache.manager.table
        tier = self.cache.manager.tiers[table.tier[sequence.row]].name
        blocks = torch.from_numpy(table.blocks[sequence.row, : table.num_blocks[sequence.row]].astype(np.int64))
        kv = KVLayer.of(self.cache.storage.tiers[tier][:, 0], torch.int32, self.cache.layout.shape)
        held = torch.stack([part[blocks].flatten() for part in (kv.key, kv.value)])
        found = held.numpy()[:, : len(tokens)]
        if not np.array_equal(found, np.stack([tokens, np.arange(len(tokens), dtype=np.int32)])):
            raise InternalError(f"a sequence of {len(tokens)} tokens does not hold in {tier} what was written")
        self.compared += len(tokens)


def replay(
    requests: Iterable[Request],
    usable_blocks: int,
    block_size: int,
    policy: str = "lru",
    with_data: bool = False,
    windows: tuple[int | None, ...] = (None,),
    host_blocks: int = 0,
    host_cache: str = "off",
) -> Replay:
    """Run a whole trace; with data, on one group and no host tier. Raises ``InternalError`` if bytes are wrong."""
    contents = _Contents(usable_blocks + 1, block_size, policy) if with_data else None
    manager = (
        contents.cache.manager
        if contents
        else BlockManager(
            usable_blocks + 1,
            block_size,
            max_sequences=1,
            eviction=policy,
            windows=windows,
            rollback=0,
            partial_hits=False,  # a trace names whole blocks, and so does the optimum
            num_host_blocks=host_blocks + 1 if host_blocks else 0,
            host_cache=host_cache,
        )
    )
    source = TokenSource()
    served = skipped = longest = held_slots = held_tokens = uniform = 0
    most = manager.max_seq_len // len(windows)
    samples: list[Sample] = []
    for request in requests:
        length = request.input_length + max(request.output_length - 1, 0)
        longest = max(longest, length)
        if length > most:
            skipped += 1
        else:
            tokens = np.concatenate([source.prompt(request), source.unique(length - request.input_length)])
            samples.append(_serve(request, tokens, manager, contents))
            served += 1
            held_slots += samples[-1].used * block_size
            held_tokens += samples[-1].used * block_size - samples[-1].waste_slots
            uniform += -(-length // block_size) * block_size * len(windows)
    manager.check()
    return Replay(
        requests=served + skipped,
        skipped=skipped,
        block_size=block_size,
        usable_blocks=usable_blocks,
        num_groups=len(windows),
        longest=longest,
        held_slots=held_slots,
        held_tokens=held_tokens,
        uniform_slots=uniform,
        compared_tokens=contents.compared if contents else 0,
        samples=tuple(samples),
        stats=manager.stats(),
    )


def _serve(request: Request, tokens: TokenArray, manager: BlockManager, contents: _Contents | None) -> Sample:
    (sequence,), promotion = manager.admit([tokens[: request.input_length]])
    if promotion is not None:
        manager.finish(promotion)
    cached = sequence.num_cached_tokens
    if contents is None:
        manager.commit(manager.reserve([sequence], [tokens[cached:]]))
    else:
        contents.compare(sequence, tokens[:cached])
        with contents.cache.step([sequence], [tokens[cached:]]) as step:
            contents.write(step, tokens[cached:], cached)
            step.commit()
        contents.move(sequence, tokens)
    device = manager.stats().device
    manager.free([sequence])
    return Sample(request.timestamp, device.used, device.cached, device.free, device.waste_slots)
