"""The contract between the cache and whatever computes attention over it.

A backend is stateless towards the pool: it sees tensors and a ``PagedBatch``, never a sequence or a reference count.
Slots that no new token sees may hold anything, NaN included, and no backend lets them reach an output: those past a
sequence's end, and those that left the window of its first new token (their blocks may belong to somebody else by now).
What a backend does not do, it declares by ``capabilities`` and refuses by ``UnsupportedFeature`` before anything is
launched; ``pagemgr.backends.checks`` has the checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, Self, runtime_checkable

import torch

from pagemgr.batch import PagedBatch
from pagemgr.errors import InvalidInput

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
"""The quantised types that a pool may hold, each with the magnitude that the largest element of a row becomes."""

LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Smaller scales are 0, as those of rows of zeros: their rows are stored as 0."""


class Feature(StrEnum):
    """Optional behaviour of ``attention``."""

    causal = "causal"
    non_causal = "non_causal"
    sliding_window = "sliding_window"
    softcap = "softcap"
    alibi = "alibi"
    sinks = "sinks"
    lse = "lse"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class KVLayer:
    """One layer of the pool: ``key`` and ``value``, each ``[num_blocks, num_kv_heads, block_size, head_dim]``.

    Views with the strides of the block-major layout (see ``pagemgr.layout``): dim is contiguous, nothing else is
    promised. Both have the same strides.

    If they are of a type in ``LARGEST``, there are ``key_scale`` and ``value_scale``, float32 ``[num_blocks,
    num_kv_heads, block_size]`` with tokens contiguous and the same strides, and what is held is ``key * key_scale``;
    else there is neither. The scale of an unwritten slot may be anything, too.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: torch.Tensor, stored: torch.dtype, shape: tuple[int, int, int]) -> Self:
        """The views of a layer's bytes, uint8 ``[num_blocks, layer_bytes]``, as ``pagemgr.layout`` draws them.

        ``stored`` is the type of the elements, ``shape`` (num_kv_heads, block_size, head_dim).
        """
        row = math.prod(shape) * stored.itemsize
        key, value, scales = layer[:, :row], layer[:, row : 2 * row], layer[:, 2 * row :]
        parts = [part.view(stored).view(-1, *shape) for part in (key, value)]
        if stored in LARGEST:
            parts += scales.view(torch.float32).view(-1, 2, *shape[:2]).unbind(1)
        return cls(*parts)


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How scores become weights. Positions are those of the sequence; ``d = key_pos - query_pos``.

    ``s = scale * q·k``, then ``softcap * tanh(s / softcap)``, then ``+ alibi_slopes[head] * d``; keys with ``d > 0``
    are masked if ``causal``, keys with ``d <= -window`` if there is a ``window``. ``sinks[head]`` is the logit of one
    more key without a value: it takes weight and gives nothing.
    """

    scale: float | None = None
    """Default ``head_dim ** -0.5``."""
    causal: bool = True
    window: int | None = None
    """Tokens a query sees, itself included (as transformers' ``sliding_window``)."""
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    """float32 ``[num_q_heads]``."""
    sinks: torch.Tensor | None = None
    """float32 ``[num_q_heads]``."""

    def __post_init__(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise InvalidInput(f"scale must be finite, got {self.scale}")
        if self.window is not None and self.window < 1:
            raise InvalidInput(f"window must be at least 1 token, got {self.window}; None is no window")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise InvalidInput(f"softcap must be positive and finite, got {self.softcap}; None is no softcap")

    def features(self, with_lse: bool) -> frozenset[Feature]:
        """The features that a call with these parameters needs."""
        used = {
            Feature.causal: self.causal,
            Feature.non_causal: not self.causal,
            Feature.sliding_window: self.window is not None,
            Feature.softcap: self.softcap is not None,
            Feature.alibi: self.alibi_slopes is not None,
            Feature.sinks: self.sinks is not None,
            Feature.lse: with_lse,
        }
        return frozenset(feature for feature, wanted in used.items() if wanted)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. ``None`` in place of a set means "any"."""

    devices: frozenset[str] | None
    """torch device types, such as ``"cpu"`` and ``"cuda"``."""
    dtypes: frozenset[torch.dtype]
    """Of queries, new keys and values, and outputs (all alike)."""
    head_dims: frozenset[int] | None = None
    group_sizes: frozenset[int] | None = None
    """Query heads per K/V head."""
    block_sizes: frozenset[int] | None = None
    kv_dtypes: frozenset[torch.dtype] = frozenset()
    """Quantised types that K and V may be stored as, of those in ``LARGEST``. As they come, they may be always."""
    features: frozenset[Feature] = field(default_factory=lambda: frozenset(Feature))
    graph_capture: bool = False
    """Whether ``write_kv`` and ``attention`` may be captured in a CUDA graph: no synchronisation, no reading of tensors
    on the host. The same captured launch serves every later batch within the captured ``max_query_len`` and
    ``max_seq_len``."""

    def missing(
        self,
        device: str,
        dtype: torch.dtype,
        head_dim: int,
        block_size: int,
        group_size: int | None = None,
        needs: frozenset[Feature] = frozenset(),
        kv_dtype: torch.dtype | None = None,
    ) -> tuple[str, ...]:
        """Why this combination cannot run, one sentence each; empty if it can.

        ``device`` is a torch device type; ``group_size`` is None where no query is involved; ``kv_dtype`` is what K and
        V are stored as, ``dtype`` unless given.
        """
        asked: tuple[tuple[str, object, frozenset[Any] | None], ...] = (
            ("device", device, self.devices),
            ("dtype", dtype, self.dtypes),
            ("kv_dtype", kv_dtype or dtype, self.kv_dtypes | {dtype}),
            ("head_dim", head_dim, self.head_dims),
            ("block_size", block_size, self.block_sizes),
            ("group size", group_size, None if group_size is None else self.group_sizes),
        )
        reasons = [
            f"{name} {value} is not one of {', '.join(map(str, sorted(allowed, key=_natural)))}"
            for name, value, allowed in asked
            if allowed is not None and value not in allowed
        ]
        reasons += [f"feature {feature.value} is not implemented" for feature in sorted(needs - self.features)]
        return tuple(reasons)


def _natural(value: object) -> tuple[int, str]:
    """Numbers by size, anything else by its name."""
    return (value, "") if isinstance(value, int) else (0, str(value))


@runtime_checkable
class Backend(Protocol):
    """Four methods and a declaration. Implement it, register it under ``pagemgr.backends``, run the conformance suite.

    A backend is a class whose constructor takes nothing. Tensors live on the pool's device; calls are asynchronous on
    its current stream where the device has streams. The last dimension of every tensor is contiguous; ``out`` and
    ``lse`` are contiguous throughout; of the others (slices of a fused projection, say) nothing more is promised.
    """

    name: str

    @classmethod
    def probe(cls) -> str | None:
        """None if this backend can run on this machine, else why not and what to do about it. Cheap, never raises."""

    def capabilities(self) -> Capabilities:
        """What this backend can do, the same for the life of the process."""

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """Store new tokens: ``key`` and ``value`` ``[num_tokens, num_kv_heads, head_dim]`` into their slots.

        ``slot_mapping`` int64 ``[num_tokens]``; a slot of -1 writes nothing. No two tokens share a slot.

        Into a quantised pool goes ``x / scale``, rounded to nearest, and the scale of each row of ``head_dim``: its
        largest magnitude over that of the type (``LARGEST``), or 0 with elements of 0 if that is below ``LEAST_SCALE``.
        A row that holds an infinity or a NaN becomes NaN throughout: its scale is not finite, whatever its elements
        are, their products with it are NaN.
        """

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend new tokens to all tokens of their sequences, their own included.

        ``query`` ``[num_tokens, num_q_heads, head_dim]``; query head ``h`` reads K/V head ``h // group_size``.
        Returns ``out`` (made if not given), of the same shape and dtype. ``lse`` float32 ``[num_tokens,
        num_q_heads]``, if given, receives the natural log of the softmax denominator, sinks included.

        A query that sees no key, as every query of a sequence of length 0, gives 0 and -inf (its sink, if it has one).
        Rows past ``query_start[-1]``, which pad a batch to a fixed size, receive 0 and -inf.
        """

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        """Copy whole blocks: ``pairs`` int64 ``[n, 2]`` (from, to), of ``source`` and ``target`` ``[num_blocks, ...]``.

        The two are one tier, or two tiers whose blocks are alike. If one of those is on a GPU, so are the pairs, and
        the other may be in pinned host memory, which kernels read and write over the bus.
        No block is written twice, and none is both read and written.
        """

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine attention over disjoint sets of keys into attention over their union.

        ``outs`` each ``[num_tokens, num_q_heads, head_dim]`` and ``lses`` each float32 ``[num_tokens, num_q_heads]``,
        as ``attention`` gives them (sinks in at most one of them); returns the same two for the union (Dao et al.,
        FlashDecoding, 2023). Where a part's lse is -inf it counts for nothing, whatever its out holds.
        """
