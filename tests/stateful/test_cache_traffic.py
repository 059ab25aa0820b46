"""A cache with everything on, under random traffic: whatever it does with blocks, attention is as it would be without.

Layers with windows and without, a host cache, forks, swaps, drafts, partial hits, poisoned free blocks. Keys and values
are functions of layer, token and position, so that dense attention over a sequence's tokens says what must come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pagemgr.backends.interface import AttentionParams
from pagemgr.backends.oracle import dense_attention
from pagemgr.cache import PagedKVCache
from pagemgr.config import Config, DebugConfig, ModelConfig, PoolConfig
from pagemgr.errors import OperatingError
from pagemgr.sequences import Sequence

WINDOWS, Q_HEADS, KV_HEADS, DIM, LONGEST = (24, 0, 24), 4, 2, 64, 96


@dataclass(eq=False)
class Stream:
    handle: Sequence
    tokens: list[int]


class Traffic:
    """An engine whose model is a table of random vectors."""

    def __init__(self, device: str, backend: str, host_cache: str, seed: int) -> None:
        dtype = "float32" if device == "cpu" else "bfloat16"
        model = ModelConfig(
            num_layers=3, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, windows=WINDOWS, dtype=dtype
        )
        pool = PoolConfig(
            num_blocks=50, block_size=8, host_blocks=60, host_cache=host_cache, max_seq_len=LONGEST, rollback=4
        )
        debug = DebugConfig(level=2)
        self.cache = PagedKVCache(Config(model=model, pool=pool, device=device, backend=backend, debug=debug))
        for tensor in self.cache.storage.tiers.values():
            tensor[1:] = 0xFF  # NaN
        self.rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            torch.randn(3, 4, LONGEST, heads, DIM, generator=generator).to(self.cache.device, getattr(torch, dtype))
            for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
        )
        self.tolerance = 1e-4 if device == "cpu" else 3e-2
        self.streams: list[Stream] = []
        self.past: list[list[int]] = [[]]
        self.compared = 0

    def rows(self, table: torch.Tensor, layer: int, tokens: list[int], start: int = 0) -> torch.Tensor:
        return table[layer, torch.tensor(tokens), torch.arange(start, start + len(tokens))]

    def draw(self, most: int) -> list[int]:
        return self.rng.integers(0, 4, self.rng.integers(1, most + 1)).tolist()

    def some(self, tier: int, most: int) -> list[Stream]:
        here = [one for one in self.streams if self.cache.manager.table.tier[one.handle.row] == tier]
        return [here[i] for i in self.rng.permutation(len(here))[:most]]

    def step(self) -> None:
        """Every layer attends, and one of them is compared; the tokens that are accepted count."""
        batch = [one for one in self.some(0, 4) if len(one.tokens) < LONGEST - 12]
        if not batch:
            return
        new = [self.draw(12 if self.rng.integers(3) == 0 else 2) for _ in batch]
        with self.cache.step([one.handle for one in batch], new) as step:
            compared = self.rng.integers(3)
            for layer, window in enumerate(WINDOWS):
                parts = [
                    torch.cat([self.rows(t, layer, n, len(one.tokens)) for one, n in zip(batch, new, strict=True)])
                    for t in (self.q, self.k, self.v)
                ]
                out = step.attention(layer, *parts, AttentionParams(window=window or None))
                if layer == compared:
                    for one, n, got in zip(batch, new, out.split([len(n) for n in new]), strict=True):
                        self.compare(layer, window, one.tokens, n, got)
            accepted = [int(self.rng.integers(1, len(n) + 1)) for n in new] if self.rng.integers(2) else None
            step.commit(accepted=accepted)
        for i, (one, n) in enumerate(zip(batch, new, strict=True)):
            one.tokens += n if accepted is None else n[: accepted[i]]

    def compare(self, layer: int, window: int, before: list[int], new: list[int], got: torch.Tensor) -> None:
        q = self.rows(self.q, layer, new, len(before))
        k, v = (self.rows(t, layer, before + new) for t in (self.k, self.v))
        wanted, _ = dense_attention(q, k, v, AttentionParams(window=window or None))
        assert (got.cpu().double() - wanted).abs().max() < self.tolerance, (layer, len(before), len(new))
        self.compared += len(new)

    def act(self) -> None:
        verb = self.rng.integers(9)
        if verb < 2 and len(self.streams) < 12:
            begun = self.past[self.rng.integers(len(self.past))]
            prompt = begun[: self.rng.integers(0, len(begun) + 1)] + self.draw(9)
            prompt = prompt[: LONGEST - 30]
            handle = self.cache.add(prompt)
            self.streams.append(Stream(handle, prompt[: handle.num_cached_tokens]))
        elif verb < 6:
            self.step()
        elif verb == 6:
            for one in self.some(int(self.rng.integers(2)), 1):
                self.streams.append(Stream(self.cache.fork(one.handle)[0], list(one.tokens)))
        elif verb == 7:
            tier = int(self.rng.integers(2))
            (self.cache.swap_in if tier else self.cache.swap_out)([one.handle for one in self.some(tier, 2)])
        else:
            gone = self.some(0, 2)
            self.cache.free([one.handle for one in gone])
            self.past = [*self.past, *(one.tokens for one in gone)][-8:]
            self.streams = [one for one in self.streams if one not in gone]


def run(device: str, backend: str, host_cache: str, calls: int) -> None:
    traffic = Traffic(device, backend, host_cache, seed=calls)
    refused = 0
    for _ in range(calls):
        try:
            traffic.act()
        except OperatingError:
            refused += 1
    manager = traffic.cache.manager
    manager.check()
    counters = manager.stats().counters
    assert traffic.compared > calls
    assert (
        min(counters.prefix_hit_tokens, counters.cow_copies, counters.swapped_blocks["in"], counters.draft_tokens) > 0
    )
    assert min(refused, counters.prefix_partial_hit_tokens) > 0
    assert (counters.promoted_blocks > 0) == (host_cache != "off")
    traffic.cache.free([one.handle for one in traffic.streams])
    manager.check()
    device_tier = manager.stats().device
    assert device_tier.free + device_tier.cached + 1 == device_tier.num_blocks


@pytest.mark.parametrize(("backend", "host_cache"), [("torch", "off"), ("torch", "exclusive"), ("cpu", "inclusive")])
def test_attention_is_what_it_would_be_without_blocks(backend: str, host_cache: str) -> None:
    if backend == "cpu":
        pytest.importorskip("cffi")
    run("cpu", backend, host_cache, calls=320)


@pytest.mark.gpu
@pytest.mark.parametrize("host_cache", ["off", "exclusive", "inclusive"])
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_the_same_on_a_gpu(backend: str, host_cache: str) -> None:
    run("cuda", backend, host_cache, calls=300)
