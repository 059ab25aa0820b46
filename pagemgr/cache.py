"""``PagedKVCache``: what an engine holds. It joins the manager's decisions, the storage's bytes and a backend."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from .backends import registry
from .backends.interface import AttentionParams, KVLayer
from .batch import BatchBuffers, PagedBatch
from .capture import beside_captures
from .config import Config
from .errors import InvalidInput, StepOrderError, TransferFailed
from .ids import BatchTokens, LateTokens, Tokens
from .manager import BlockManager
from .pins import Pin
from .plan import Plan, Transfer
from .pool import Fence
from .prefix import Namespace
from .recording import RecordingManager
from .sequences import Batch, Sequence
from .stats import Stats
from .storage import Storage
from .timings import ONE_IN, Mark, Timings

if TYPE_CHECKING:
    from .service import Server

_log = logging.getLogger(__name__)
_DEFAULT_PARAMS = AttentionParams()


class Step:
    """One forward pass over a batch. Leaving its ``with`` block without ``commit`` aborts it: nothing has changed."""

    def __init__(
        self,
        cache: PagedKVCache,
        plan: Plan,
        batches: tuple[PagedBatch, ...],
        buffers: BatchBuffers,
        start: Mark | None,
    ) -> None:
        self.plan = plan
        self.batches = batches
        """By layer group: the same sequences, in blocks of their own."""
        self._cache = cache
        self._buffers: BatchBuffers | None = buffers
        self._start = start
        self._kind = "decode" if batches[0].max_query_len == 1 else "prefill"
        self._timed_layer = -1 if start is None else plan.step // ONE_IN["step"] % cache.config.model.num_layers

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams = _DEFAULT_PARAMS,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new tokens' K and V of one layer, then attend to everything their sequences hold.

        ``query`` ``[num_tokens, num_q_heads, head_dim]``, ``key`` and ``value`` ``[num_tokens, num_kv_heads,
        head_dim]``, in the order of the batch. Returns ``[num_tokens, num_q_heads, head_dim]``; ``out`` and ``lse``
        as in ``Backend.attention``. Raises ``InvalidInput``, ``UnsupportedFeature``.
        """
        self._require_open()
        layout, tokens = self._cache.layout, self.plan.num_tokens
        number, kv = self._cache.layer(layer)
        group = self._cache.groups[number]
        if group.window is not None and not (params.causal and params.window and params.window <= group.window):
            raise InvalidInput(
                f"layer {layer} keeps {group.window} tokens by model.windows, and is asked for attention over "
                f"{'as many as there are' if params.window is None else params.window}"
            )
        kv_shape = (tokens, layout.num_kv_heads, layout.head_dim)
        if key.shape != kv_shape or value.shape != kv_shape:
            raise InvalidInput(f"key and value must be {list(kv_shape)}, got {list(key.shape)} and {list(value.shape)}")
        if (
            query.ndim != 3
            or query.shape[0] != tokens
            or query.shape[2] != layout.head_dim
            or query.shape[1] % layout.num_kv_heads
        ):
            shape = f"[{tokens}, multiple of {layout.num_kv_heads}, {layout.head_dim}]"
            raise InvalidInput(f"query must be {shape}, got {list(query.shape)}")
        backend, batch, timings = self._cache.backend, self.batches[number], self._cache.timings
        mark = timings.now() if layer == self._timed_layer else None
        backend.write_kv(key, value, kv, batch.slot_mapping)
        mark = timings.lap("kernel", "write_kv", mark, layer=layer)
        result = backend.attention(query, kv, batch, params, out, lse)
        timings.lap("kernel", self._kind, mark, layer=layer)
        return result

    def commit(self, tokens: LateTokens = None, accepted: SequenceOf[int] | None = None) -> None:
        """Every layer has run. ``tokens`` and ``accepted`` as in ``BlockManager.commit``."""
        self._require_open()
        self._cache.manager.commit(self.plan, tokens, accepted)
        self._cache.timings.lap("step", self._kind, self._start, step=self.plan.step)
        self._end()

    def abort(self) -> None:
        """Take the step back."""
        self._require_open()
        self._cache.manager.abort(self.plan)
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buffers is not None:
            self.abort()

    def _require_open(self) -> None:
        if self._buffers is None:
            raise StepOrderError(f"step {self.plan.step} has already ended")

    def _end(self) -> None:
        assert self._buffers is not None
        self._cache.reclaim(self._buffers)
        self._buffers = None


class PagedKVCache:
    """A paged KV cache: sequences in, attention out.

    Raises ``ConfigError``, ``BackendUnavailable`` or ``UnsupportedFeature`` if what ``config`` asks for cannot be had.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.layout = config.layout
        self.groups = config.layer_groups
        self._clock = clock
        self.device = _device(config.device)
        group_size = config.model.num_q_heads // config.model.num_kv_heads
        self.backend = registry.create(
            config.backend, self.layout, group_size, self.device, cache_dir=config.native.cache_dir
        )
        num_blocks = config.resolve_num_blocks(_free_bytes(self.device))
        record = config.debug.record
        make = BlockManager if record is None else partial(RecordingManager, record)
        self.manager = make(
            num_blocks,
            self.layout.block_size,
            max_sequences=config.pool.max_sequences,
            max_seq_len=config.resolve_max_seq_len(num_blocks),
            num_host_blocks=config.resolve_host_blocks(),
            host_cache=config.pool.host_cache,
            windows=tuple(group.window for group in self.groups),
            rollback=config.pool.rollback,
            watermark=int(num_blocks * config.pool.watermark),
            pin_quota=int(num_blocks * config.prefix.pin_share),
            prefix_caching=config.prefix.enabled,
            partial_hits=config.prefix.partial_hits,
            verify_hits=config.prefix.verify_hits,
            secret=config.prefix.secret.get_secret_value().encode() if config.prefix.secret else b"",
            eviction=config.eviction.policy,
            debug=config.debug.level,
            cache_dir=config.native.cache_dir,
        )
        sizes = {tier.name: tier.pool.num_blocks for tier in self.manager.tiers}
        watches = {tier.name: tier.pool.watch for tier in self.manager.tiers if tier.pool.watch is not None}
        self.timings = Timings(self.device, config.metrics.timings)
        self.storage = Storage(self.layout, sizes, self.device, self.backend, self.timings, watches)
        self._places = {
            layer: (number, self.storage.layers[place])
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }
        self._idle_buffers: list[BatchBuffers] = []

    def add(self, prompt: Tokens = (), namespace: Namespace | None = None) -> Sequence:
        """A new sequence that starts with what is cached of its prompt; see ``BlockManager.add_many``."""
        return self.add_many([prompt], [namespace])[0]

    def add_many(
        self, prompts: SequenceOf[Tokens], namespaces: SequenceOf[Namespace | None] | None = None
    ) -> list[Sequence]:
        """New sequences, all or none; see ``BlockManager.add_many``. What the host cache holds of them comes up."""
        if self.manager.pins:
            self.manager.expire(self._clock())
        sequences, promotion = self.manager.admit(prompts, namespaces)
        if promotion is None:
            return sequences
        try:
            fence = self.storage.execute(promotion.copies)
        except Exception as error:
            self.manager.cancel(promotion)
            _log.warning("%d blocks of the host could not come up: %s", promotion.num_copied, error)
            return self.manager.add_many(prompts, namespaces)
        except BaseException:
            self.manager.cancel(promotion)
            raise
        self.manager.finish(promotion, fence)
        return sequences

    def pin(self, sequence: Sequence, owner: str, length: int | None = None, ttl: float | None = None) -> Pin:
        """Keep a prefix on the device for ``ttl`` seconds, or until ``unpin``; see ``BlockManager.pin``.

        Each rank has its own clock: ranks that must decide alike call ``manager.pin`` and ``manager.expire`` with a
        time that they share.
        """
        return self.manager.pin(sequence, owner, length, None if ttl is None else self._clock() + ttl)

    def unpin(self, pin: Pin) -> None:
        """End a pin; see ``BlockManager.unpin``."""
        self.manager.unpin(pin)

    def clear(self) -> int:
        """Forget what is cached and nobody holds; see ``BlockManager.clear``."""
        return self.manager.clear()

    def layer(self, layer: int) -> tuple[int, KVLayer]:
        """The number of a layer's group, and where its keys and values are. Raises ``InvalidInput``."""
        if layer not in self._places:
            raise InvalidInput(f"layer {layer} is not in [0, {len(self._places)})")
        return self._places[layer]

    def step(self, sequences: SequenceOf[Sequence] | Batch, tokens: BatchTokens) -> Step:
        """Reserve slots for the new tokens of a batch, for all of it or none; see ``BlockManager.reserve``."""
        self.storage.audit()
        start = self.timings.start("step")
        plan = self.manager.reserve(sequences, tokens)
        try:
            self.storage.execute(plan.copies)
            buffers = self._idle_buffers.pop() if self._idle_buffers else self._make_buffers()
            return Step(self, plan, buffers.fill(plan), buffers, start)
        except BaseException:
            self.manager.abort(plan)
            raise

    def fork(self, sequence: Sequence, n: int = 1) -> list[Sequence]:
        """``n`` copies that share every block until one of them writes; see ``BlockManager.fork``."""
        return self.manager.fork(sequence, n)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Cut a sequence back to ``length`` tokens; see ``BlockManager.truncate``."""
        self.manager.truncate([sequence], [length])

    def free(self, sequences: SequenceOf[Sequence] | Batch, after: Fence | None = None) -> None:
        """End sequences; their blocks are reused once ``after`` has passed. See ``BlockManager.free``."""
        self.manager.free(sequences, after)

    def swap_out(self, sequences: SequenceOf[Sequence]) -> None:
        """Move sequences to host memory. Raises ``OutOfBlocks`` or ``TransferFailed``; all move or none."""
        self._transfer(self.manager.swap_out(sequences))

    def swap_in(self, sequences: SequenceOf[Sequence]) -> None:
        """Move sequences back to the device. Raises ``OutOfBlocks`` or ``TransferFailed``; all move or none."""
        self._transfer(self.manager.swap_in(sequences))

    def length(self, sequence: Sequence) -> int:
        """Tokens of a sequence whose K and V are in the cache."""
        return int(self.manager.lengths([sequence])[0])

    def stats(self) -> Stats:
        """One consistent snapshot, and how long things took. May be called from any thread at any time."""
        with beside_captures(self.device):
            return replace(self.manager.stats(), timings=self.timings.snapshot())

    def serve(self, port: int | None = None) -> Server:
        """The page, the JSON API and the metrics of this cache, from a thread; see ``pagemgr.service.serve``."""
        from .service import serve

        return serve(self, port=port)

    def reclaim(self, buffers: BatchBuffers) -> None:
        """A step ended: its tensors serve the next."""
        self._idle_buffers.append(buffers)

    def _transfer(self, transfer: Transfer) -> None:
        try:
            fence = self.storage.execute(transfer.copies, "in" if transfer.target == "device" else "out")
        except Exception as error:
            self.manager.cancel(transfer)
            raise TransferFailed(transfer.source, transfer.target, transfer.num_copied) from error
        except BaseException:
            self.manager.cancel(transfer)
            raise
        self.manager.finish(transfer, fence)

    def _make_buffers(self) -> BatchBuffers:
        width = self.manager.table.blocks.shape[1]
        tokens = (self.manager.tiers[0].pool.num_blocks - 1) * self.layout.block_size
        sequences, groups = self.manager.table.max_sequences, len(self.groups)
        return BatchBuffers(self.device, sequences, groups, width, min(tokens, sequences * self.manager.max_seq_len))


def open_cache(path: str | os.PathLike[str] | None = None) -> PagedKVCache:
    """A cache from a TOML file and the ``PAGEMGR_*`` environment; exported as ``pagemgr.open``."""
    return PagedKVCache(Config.load(path))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
