"""Fresh random inputs for the conformance suite: a case says what, ``build`` makes tensors of it.

A case's pool is block-major with several layers, of which one is used; every slot that the case must not read is
poisoned, and sequences own shuffled blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pagemgr.batch import PagedBatch

from .interface import LARGEST, AttentionParams, Capabilities, Feature, KVLayer
from .oracle import dense_attention

NUM_LAYERS, LAYER = 3, 1

ANY_HEAD_DIM = (20, 64, 80, 96, 128, 256)
ANY_GROUP_SIZE = (1, 2, 3, 4, 5, 8)
ANY_BLOCK_SIZE = (1, 8, 12, 16, 24, 32, 64)

FEATURES: dict[Feature, dict[str, Any]] = {
    Feature.causal: {"causal": True},
    Feature.non_causal: {"causal": False},
    Feature.sliding_window: {"window": 7},
    Feature.softcap: {"softcap": 1.5},
    Feature.alibi: {"alibi": True},
    Feature.sinks: {"sinks": True},
    Feature.lse: {"with_lse": True},
}
"""What a case sets to ask for a feature."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of ``attention``."""

    dtype: torch.dtype
    head_dim: int
    block_size: int
    group_size: int
    kv_heads: int = 2
    seqs: tuple[tuple[int, int], ...] = ()
    """(tokens in the cache, how many of the last are new); new ones of none are padding rows."""
    padding: int = 0
    """Rows of the query past the last sequence."""
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    alibi: bool = False
    sinks: bool = False
    with_lse: bool = False
    poison: float = torch.nan
    kv_dtype: torch.dtype | None = None
    """What the pool holds, quantised; ``dtype`` unless given."""

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group_size

    def params(self, generator: torch.Generator, device: str) -> AttentionParams:
        """Parameters with fresh slopes and sinks."""
        return AttentionParams(
            scale=self.scale,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=(torch.rand(self.heads, generator=generator) / 4).to(device) if self.alibi else None,
            sinks=torch.randn(self.heads, generator=generator).to(device) if self.sinks else None,
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """The tensors of a case, and what attention over them is."""

    query: torch.Tensor
    """``[num_tokens, heads, head_dim]``, a slice of a wider tensor, as of a fused projection."""
    pool: torch.Tensor
    """Bytes, uint8 ``[num_blocks, NUM_LAYERS, layer_bytes]``."""
    stored: torch.dtype
    shape: tuple[int, int, int]
    """(kv_heads, block_size, head_dim)"""
    batch: PagedBatch
    params: AttentionParams
    keys: tuple[torch.Tensor, ...]
    """Per sequence ``[seq_len, kv_heads, head_dim]``: what the pool holds, not quantised."""
    values: tuple[torch.Tensor, ...]

    @property
    def kv(self) -> KVLayer:
        """The layer of the pool that holds keys and values."""
        return KVLayer.of(self.pool[:, LAYER], self.stored, self.shape)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By the oracle, float64 on the CPU: outputs and log denominators, for the lengths now in ``batch``."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        lse = torch.full(self.query.shape[:2], -torch.inf, dtype=torch.float64)
        bounds = itertools.pairwise(self.batch.query_start.tolist())
        lens = self.batch.seq_lens.tolist()
        for (start, stop), seq_len, key, value in zip(bounds, lens, self.keys, self.values, strict=True):
            query = self.query[start:stop]
            out[start:stop], lse[start:stop] = dense_attention(query, key[:seq_len], value[:seq_len], self.params)
        return out, lse


def build(case: Case, generator: torch.Generator, device: str) -> Problem:
    """Fresh tensors for a case; ``generator`` is a CPU one."""
    size = case.block_size
    params = case.params(generator, device)
    counts = [-(-seq_len // size) for seq_len, _ in case.seqs]
    block_ids = torch.split(1 + torch.randperm(sum(counts) + 4, generator=generator), [*counts, 4])
    table = torch.zeros(len(counts), max(counts, default=0) + 2, dtype=torch.int32)
    stored, shape = case.kv_dtype or case.dtype, (case.kv_heads, size, case.head_dim)
    pool = _poisoned(sum(counts) + 5, stored, shape, case.poison)
    kv = KVLayer.of(pool[:, LAYER], stored, shape)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    slots: list[torch.Tensor] = []
    for row, (seq_len, new) in enumerate(case.seqs):
        first = 0 if case.window is None else max(0, seq_len - new - case.window + 1)  # what the first new token sees
        positions = torch.arange(first, seq_len)
        blocks, offsets = block_ids[row][positions // size], positions % size
        for part, scale, held in ((kv.key, kv.key_scale, keys), (kv.value, kv.value_scale, values)):
            rows = torch.randn(seq_len, case.kv_heads, case.head_dim, generator=generator)
            if scale is not None:  # any scales, not those that write_kv would choose
                scales = 2 ** (2 * torch.rand(rows.shape[:2], generator=generator)) / LARGEST[stored]
                scale[blocks, :, offsets] = scales[first:]
                rows = (rows / scales.unsqueeze(-1)).clamp(-LARGEST[stored], LARGEST[stored])
            rows = rows.to(stored)
            part[blocks, :, offsets] = rows[first:]
            held.append((rows if scale is None else rows.double() * scales.double().unsqueeze(-1)).to(device))
        table[row, first // size : counts[row]] = block_ids[row][first // size :]
        slots.append((blocks * size + offsets)[len(blocks) - new :] if seq_len else torch.full((new,), -1))
    slots.append(torch.full((case.padding,), -1))
    news = [new for _, new in case.seqs]
    num_tokens = sum(news) + case.padding
    query = torch.randn(num_tokens, case.heads + 2, case.head_dim, generator=generator).to(device, case.dtype)
    batch = PagedBatch(
        block_table=table.to(device),
        seq_lens=torch.tensor([seq_len for seq_len, _ in case.seqs], dtype=torch.int32).to(device),
        query_start=torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32).to(device),
        slot_mapping=torch.cat(slots).to(device, torch.int64),
        max_query_len=max(news, default=0),
        max_seq_len=max((seq_len for seq_len, _ in case.seqs), default=0),
    )
    return Problem(query[:, : case.heads], pool.to(device), stored, shape, batch, params, tuple(keys), tuple(values))


def _poisoned(num_blocks: int, stored: torch.dtype, shape: tuple[int, int, int], poison: float) -> torch.Tensor:
    """A pool whose every element is ``poison``; quantised, every scale, and elements NaN or the largest there are."""
    token_bytes = shape[2] * stored.itemsize + (4 if stored in LARGEST else 0)
    pool = torch.full((num_blocks, NUM_LAYERS, 2 * shape[0] * shape[1] * token_bytes), 0x7F, dtype=torch.uint8)
    for layer in pool.unbind(1):
        kv = KVLayer.of(layer, stored, shape)
        for part, scale in ((kv.key, kv.key_scale), (kv.value, kv.value_scale)):
            (part if scale is None else scale).fill_(poison)
    return pool


def base_case(capabilities: Capabilities) -> Case:
    """A mixed batch, in the most usual shape that is declared."""
    size = _usual(capabilities.block_sizes, 16)
    return Case(
        dtype=torch.float32 if torch.float32 in capabilities.dtypes else min(capabilities.dtypes, key=str),
        head_dim=_usual(capabilities.head_dims, 64),
        block_size=size,
        group_size=_usual(capabilities.group_sizes, 2),
        seqs=mixed(size),
        causal=Feature.causal in capabilities.features,
        with_lse=Feature.lse in capabilities.features,
    )


def mixed(size: int) -> tuple[tuple[int, int], ...]:
    """Decodes, prompts, chunks of prompts and an empty row."""
    prompts = ((size - 1, size - 1), (2 * size, 2 * size), (1, 1))
    return ((size, 1), *prompts, (0, 0), (3 * size + 2, size + 3), (2 * size + 1, 1))


def attention_cases(capabilities: Capabilities) -> Iterator[tuple[str, Case]]:
    """Named cases of all that is declared."""
    base = base_case(capabilities)
    every = {key: value for feature in capabilities.features for key, value in FEATURES[feature].items()}
    every["causal"] = base.causal
    dims, sizes, groups = capabilities.head_dims, capabilities.block_sizes, capabilities.group_sizes
    for dtype in sorted(capabilities.dtypes, key=str):
        yield f"{dtype}-all-features", replace(base, dtype=dtype, **every)
        for dim in sorted(dims or ANY_HEAD_DIM):
            yield f"{dtype}-head_dim-{dim}", replace(base, dtype=dtype, head_dim=dim)
    for size in sorted(sizes or ANY_BLOCK_SIZE):
        yield f"block_size-{size}", replace(base, block_size=size, seqs=mixed(size))
    for group in sorted(groups or ANY_GROUP_SIZE):
        yield f"group_size-{group}", replace(base, group_size=group)
    yield "one-kv-head", replace(base, kv_heads=1)
    for name, overrides in _mask_cases(base.block_size):
        case = replace(base, **overrides)
        needs = case.params(torch.Generator(), "cpu").features(case.with_lse)
        if needs <= capabilities.features:
            yield name, case
    for name, seqs, padding in _batch_shapes(base.block_size):
        yield name, replace(base, seqs=seqs, padding=padding)
    for kv_dtype in sorted(capabilities.kv_dtypes, key=str):
        for name, case in _quantised_cases(base, capabilities):
            yield f"{kv_dtype}-{name}", replace(case, kv_dtype=kv_dtype)


def _quantised_cases(base: Case, capabilities: Capabilities) -> Iterator[tuple[str, Case]]:
    """What reads scales otherwise, or from elsewhere."""
    every = {key: value for feature in capabilities.features for key, value in FEATURES[feature].items()}
    for dtype in sorted(capabilities.dtypes, key=str):
        yield f"{dtype}", replace(base, dtype=dtype)
        yield f"{dtype}-all-features", replace(base, dtype=dtype, **every | {"causal": base.causal})
    for dim in sorted(capabilities.head_dims or ANY_HEAD_DIM):
        yield f"head_dim-{dim}", replace(base, head_dim=dim)
    for size in sorted(capabilities.block_sizes or ANY_BLOCK_SIZE):
        yield f"block_size-{size}", replace(base, block_size=size, seqs=mixed(size))
    groups = sorted(capabilities.group_sizes or ANY_GROUP_SIZE)
    for group in sorted({groups[0], groups[-1]}):
        yield f"group_size-{group}", replace(base, group_size=group)
    yield "infinite-poison", replace(base, poison=torch.inf)
    for name, seqs, padding in _batch_shapes(base.block_size):
        if "long" in name or name == "chunks":
            yield name, replace(base, seqs=seqs, padding=padding)


def _mask_cases(size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "scale", {"scale": 0.3}
    yield "infinite-poison", {"poison": torch.inf}
    for window in sorted({1, 7, size, size + 1, 1000}):
        yield f"window-{window}", {"window": window}
    yield "window-of-long-decode", {"window": 5 * size, "seqs": ((20 * size + 3, 1), (5 * size, 1), (9 * size, 2))}
    optional = (Feature.sliding_window, Feature.softcap, Feature.alibi, Feature.sinks)
    for causal in (Feature.causal, Feature.non_causal):
        yield causal.value, FEATURES[causal]
        for one, other in itertools.combinations_with_replacement(optional, 2):
            name = "-".join(dict.fromkeys((causal.value, one.value, other.value)))
            yield name, FEATURES[causal] | FEATURES[one] | FEATURES[other]
    yield "sinks-without-keys", {"sinks": True, "seqs": ((0, 1), (3, 1), (0, 2))}
    yield "without-lse", {"with_lse": False}


def _batch_shapes(size: int) -> Iterator[tuple[str, tuple[tuple[int, int], ...], int]]:
    lens = sorted({1, max(1, size - 1), size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1, 5 * size})
    yield "decode-at-boundaries", tuple((seq_len, 1) for seq_len in lens), 0
    yield "prefill-at-boundaries", tuple((seq_len, seq_len) for seq_len in lens), 0
    yield "chunks", tuple((cached + new, new) for cached in lens[:4] for new in (1, 2, size, size + 1)), 0
    yield "long-decode", ((1000, 1), (3, 1), (517, 1)), 0
    yield "long-prefill", ((5, 1), (333, 300)), 0
    yield "one-token", ((1, 1),), 0
    yield "empty-rows", ((0, 0), (5, 1), (0, 0)), 0
    yield "only-empty-rows", ((0, 0), (0, 0)), 0
    yield "no-sequence", (), 0
    yield "only-padding", (), 3
    yield "padding", ((0, 1), (size + 1, 1), (0, 2), (5, 3)), 5


def refused_layouts(capabilities: Capabilities) -> Iterator[tuple[str, Case]]:
    """Pools that are not declared."""
    base = base_case(capabilities)
    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    for dtype in sorted(floats - capabilities.dtypes, key=str):
        yield f"{dtype}", replace(base, dtype=dtype)
    for kv_dtype in sorted(LARGEST.keys() - capabilities.kv_dtypes, key=str):
        yield f"{kv_dtype}", replace(base, kv_dtype=kv_dtype)
    for dim in _outside(capabilities.head_dims):
        yield f"head_dim-{dim}", replace(base, head_dim=dim)
    for size in _outside(capabilities.block_sizes):
        yield f"block_size-{size}", replace(base, block_size=size)


def refused_queries(capabilities: Capabilities) -> Iterator[tuple[str, Case]]:
    """Calls on a declared pool that are not declared."""
    base = base_case(capabilities)
    for group in _outside(capabilities.group_sizes):
        yield f"group_size-{group}", replace(base, group_size=group)
    for feature in sorted(set(Feature) - capabilities.features):
        yield feature.value, replace(base, **FEATURES[feature])


def _usual(declared: frozenset[int] | None, usual: int) -> int:
    """The declared number nearest to the usual one."""
    return usual if declared is None else min(declared, key=lambda n: (abs(n - usual), -n))


def _outside(declared: frozenset[int] | None) -> list[int]:
    """One small number that is not declared, if there is one."""
    return [] if declared is None else [next(n for n in itertools.count(8) if n not in declared)]
