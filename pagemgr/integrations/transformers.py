"""Hugging Face transformers: any causal LM of theirs, with its KV cache and its attention replaced by pagemgr's.

    from pagemgr.integrations.transformers import PagedCache      registers the attention named "pagemgr"

    model.set_attn_implementation("pagemgr")
    cache = PagedCache.for_model(model, num_blocks=256, block_size=16)
    model.generate(ids, past_key_values=cache)
    cache.reset()                                                 gives the blocks back

Three public hooks of transformers carry it, and everything travels in their arguments, so there is no global state:

    AttentionMaskInterface ─► PlainMask, where each row begins and the window ──────────┐
    Cache.update ─► PagedStates, the new K or V and the rows it belongs to ─────────────┤
    AttentionInterface: attention(module, query, PagedStates, PagedStates, PlainMask) ◄─┘

Grouped queries, sliding windows by layer, softcap, sinks and left padding are handled, and so is what ``generate``
does to a cache: beams and several answers (``reorder_cache`` forks), assisted generation (``crop``). Anything else that
would change attention is refused: other masks, right padding, dropout, gradients, unknown tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from pagemgr.backends.interface import AttentionParams
from pagemgr.cache import PagedKVCache
from pagemgr.config import Config, ModelConfig, PoolConfig
from pagemgr.errors import InvalidInput

from .rows import PaddedRows

NAME = "pagemgr"
"""What to pass to ``set_attn_implementation``, or to ``from_pretrained`` as ``attn_implementation``."""

MASK_CHUNK = 256
"""Queries whose mask is looked at at once: bounds the memory for a long prompt."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""The two kinds of layers there are, by their names in ``config.layer_types``."""

HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})
"""Tensors that models hand to their attention although it has no use for them."""

_CAUSAL = cast(Callable[..., torch.Tensor], causal_mask_function)


@dataclass(frozen=True, slots=True)
class PlainMask:
    """A mask that paged attention can do: causal, in a window or not, over rows that may be padded on the left."""

    starts: tuple[int, ...]
    """The column at which each row begins."""
    window: int | None


@dataclass(frozen=True, slots=True)
class PagedStates:
    """K or V as ``PagedCache.update`` returns it. Whatever but our attention touches it learns what is wrong."""

    new: torch.Tensor
    rows: PaddedRows
    layer: int
    window: int | None
    """Of this layer, as the model's config has it."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise InvalidInput(
            f'a PagedCache is read by the attention "{NAME}" alone: call model.set_attn_implementation("{NAME}"). '
            "(If you did: this model's attention does not go through transformers' AttentionInterface.)"
        )

    def __getattr__(self, name: str) -> Any:
        return self.__torch_function__()


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> PlainMask:
    """What ``AttentionMaskInterface`` calls: the mask of one kind of layer, if it is a plain one.

    ``mask_function(row, head, query, key)`` is the pattern, on column numbers; ``attention_mask`` bool ``[batch,
    columns]`` is False where there is padding. Raises ``InvalidInput`` for any other pattern or padding.
    """
    if mask_function is not _CAUSAL:
        if use_vmap:
            raise InvalidInput("paged attention is causal, this model adds a mask function of its own")
        _require_plain(mask_function, batch_size, range(q_offset, q_offset + q_length), kv_length, local_size, device)
    return PlainMask(_starts(attention_mask, batch_size, kv_length), local_size)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedStates,
    value: torch.Tensor | PagedStates,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What ``AttentionInterface`` calls, once for each layer.

    ``query`` ``[batch, num_q_heads, columns, head_dim]``; ``s_aux`` ``[num_q_heads]`` are sinks. Returns ``[batch,
    columns, num_q_heads, head_dim]``, and no weights. Raises ``InvalidInput``.
    """
    if not (isinstance(key, PagedStates) and isinstance(value, PagedStates)):
        raise InvalidInput(f'attention "{NAME}" reads from a PagedCache: pass one as past_key_values')
    if not isinstance(attention_mask, PlainMask):
        raise InvalidInput("paged attention takes a 2-D attention_mask or none: this model or its caller made another")
    if attention_mask.window != key.window:
        windows = f"{key.window} by the model's config, {attention_mask.window} by its mask"
        raise InvalidInput(f"the window of layer {key.layer} is {windows}")
    if dropout:
        raise InvalidInput(f"paged attention has no dropout, got {dropout}: call model.eval()")
    if query.requires_grad:
        raise InvalidInput("paged attention has no gradients: run the model under torch.no_grad()")
    if unknown := {name for name, given in others.items() if isinstance(given, torch.Tensor)} - HARMLESS_TENSORS:
        raise InvalidInput(f"paged attention does not know what {', '.join(sorted(unknown))} mean for the scores")
    if key.layer == 0:
        _require_one_text(others.get("position_ids"), attention_mask.starts, key.rows.length)
    sinks = None if s_aux is None else s_aux.float()
    params = AttentionParams(scale=scaling, window=attention_mask.window, softcap=softcap, sinks=sinks)
    return key.rows.attention(key.layer, query, key.new, value.new, attention_mask.starts, params), None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, paged_mask)


class _PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the rows: all layers have the same ones."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: PaddedRows, layer: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.layer = layer
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pool is there already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand new K and V ``[batch, num_kv_heads, columns, head_dim]`` on to our attention, which stores them."""
        key, value = (PagedStates(new, self.rows, self.layer, self.window) for new in (key_states, value_states))
        return cast(torch.Tensor, key), cast(torch.Tensor, value)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask spans, and the first of them: windows are cut by the attention, not by the cache."""
        return self.rows.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.rows.length

    def get_max_length(self) -> int:
        """Columns of the longest row that the block table has room for."""
        return self.rows.pool.manager.max_seq_len


class PagedCache(Cache):
    """A transformers cache that keeps its K and V in the blocks of ``pool``; the rows of one batch at a time.

    ``config`` is the model's. The number of rows comes from the first forward; ``reset`` ends them. A forward that
    raised midway is taken back by whatever is done with the cache next. The pool must serve nothing else while a
    forward runs. Raises ``InvalidInput`` for a model that it cannot serve.
    """

    def __init__(self, config: PreTrainedConfig, pool: PagedKVCache) -> None:
        rows, windows = PaddedRows(pool), layer_windows(config)
        made_for = pool.config.model.num_layers
        if len(windows) != made_for:
            raise InvalidInput(f"the model has {len(windows)} layers, the pool is made for {made_for}")
        super().__init__(layers=[_PagedLayer(rows, layer, window) for layer, window in enumerate(windows)])
        self.pool = pool
        self._rows = rows

    @classmethod
    def for_model(cls, model: PreTrainedModel, backend: str = "auto", **pool: Any) -> Self:
        """A cache with a pool of its own, which fits ``model`` and lives on its device.

        ``pool`` as the fields of ``pagemgr.config.PoolConfig``: ``num_blocks=`` or ``size="1GiB"``, ``block_size=``.
        Raises ``InvalidInput`` for a model that it cannot serve, ``ConfigError``, ``BackendUnavailable``.
        """
        sizes, device = model_config(model.config, model.dtype), str(model.device)
        settings = Config(model=sizes, pool=PoolConfig(**pool), device=device, backend=backend)
        return cls(model.config, PagedKVCache(settings))

    def reset(self) -> None:
        """End all rows and give their blocks back."""
        self._rows.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns: transformers passes the number with a minus sign."""
        if tokens_to_remove > 0:
            raise InvalidInput(f"crop takes how many columns to remove as a negative number, got {tokens_to_remove}")
        self._rows.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` goes on from what row ``beam_idx[i]`` was; rows share their blocks until they write."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every row into ``repeats`` rows that share its blocks."""
        self.batch_select_indices(torch.arange(self._rows.size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row ``i`` becomes what row ``indices[i]`` was; rows that are not named end."""
        if self._rows.length:
            self._rows.take(torch.arange(self._rows.size)[indices.cpu()].tolist())


def model_config(config: PreTrainedConfig, dtype: torch.dtype) -> ModelConfig:
    """What a pool needs to know of a model.

    Raises ``InvalidInput`` for a model that a ``PagedCache`` cannot serve, or ``ConfigError`` for its dtype.
    """
    windows = [window or 0 for window in layer_windows(config)]
    text = config.get_text_config(decoder=True)
    element: Any = str(dtype).removeprefix("torch.")
    try:
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
    except AttributeError as error:  # also where the layers of one model differ
        raise InvalidInput(f"{config.model_type} does not have heads of one size and number: {error}") from error
    return ModelConfig(
        num_layers=len(windows),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_q_heads=heads,
        dtype=element,
        windows=tuple(windows) if any(windows) else (),
    )


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, None for one that attends to everything.

    Raises ``InvalidInput`` if there are layers of another kind, which keep something else than K and V.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise InvalidInput(f"{config.model_type} has layers that attend to what others keep, no PagedCache can")
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    usual = SLIDING if window is not None else FULL if chunk is None else "chunked_attention"
    kinds = getattr(text, "layer_types", None) or [usual] * text.num_hidden_layers
    if strange := set(kinds) - {FULL, SLIDING}:
        raise InvalidInput(f"{config.model_type} has {', '.join(sorted(strange))} layers, not only {FULL}, {SLIDING}")
    return [window if kind == SLIDING else None for kind in kinds]


def _require_plain(
    mask_function: Callable[..., torch.Tensor],
    batch: int,
    queries: range,
    kv_length: int,
    window: int | None,
    device: torch.device | str,
) -> None:
    """Raise unless the pattern is causal within ``window``; compared entry by entry, as names say little about it."""
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.zeros(1, dtype=torch.long, device=device)
    key = torch.arange(kv_length, device=device)
    for first in range(queries.start, queries.stop, MASK_CHUNK):
        query = torch.arange(first, min(first + MASK_CHUNK, queries.stop), device=device).unsqueeze(1)
        plain = key <= query if window is None else (key <= query) & (key > query - window)
        if not bool((mask_function(row, head, query, key) == plain).all()):
            raise InvalidInput("paged attention is causal, in a sliding window or not: this model masks otherwise")


def _starts(attention_mask: torch.Tensor | None, batch: int, columns: int) -> tuple[int, ...]:
    """The first column of each row that is no padding; ``columns`` for a row that is nothing else."""
    if attention_mask is None:
        return (0,) * batch
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < columns:
        raise InvalidInput(f"attention_mask must be [{batch}, {columns}], got {list(attention_mask.shape)}")
    real = attention_mask[:, :columns].bool()
    starts = columns - real.sum(dim=1)
    if not bool((real == (torch.arange(columns, device=real.device) >= starts.unsqueeze(1))).all()):
        raise InvalidInput(
            "paged attention takes padding on the left alone: every row of attention_mask must be zeros, then ones; "
            'tokenize with padding_side="left"'
        )
    return tuple(starts.tolist())


def _require_one_text(position_ids: torch.Tensor | None, starts: tuple[int, ...], length: int) -> None:
    """Raise if positions run backwards within a row: several texts are packed into it."""
    if position_ids is None or position_ids.ndim != 2:
        return
    columns = length + torch.arange(1, position_ids.shape[1], device=position_ids.device)
    inside = columns > torch.tensor(starts, device=position_ids.device).unsqueeze(1)
    if bool(((position_ids.diff(dim=1) <= 0) & inside).any()):
        raise InvalidInput("position_ids run backwards: paged attention takes one text in a row, not several packed")
