"""What of a model its K/V cache depends on, from the ``config.json`` that every published model carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagemgr.errors import InvalidInput
from pagemgr.layout import BlockLayout, DType, KVDType, LayerGroup, group_layers

KEEPS_NO_KV = ("linear_attention", "mamba", "recurrent", "conv")
"""Kinds of layers, or beginnings of them, whose state does not grow with the sequence."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The whole model, before it is split over ranks."""

    windows: tuple[int, ...]
    """Of each layer that keeps K and V: the tokens that it sees, 0 for all."""
    num_kv_heads: int
    num_q_heads: int
    head_dim: int
    dtype: DType
    kv_dtype: KVDType = KVDType.auto
    max_context: int | None = None
    """Tokens that the model was made for."""
    latent_dim: int = 0
    """Elements a layer and token of a latent cache (MLA), for all heads; 0 where K and V are kept per head."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of one token in one layer."""
        if self.latent_dim:
            return self.latent_dim * self.dtype.itemsize
        return BlockLayout(1, self.num_kv_heads, self.head_dim, 1, self.dtype, self.kv_dtype).token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, those with a window included."""
        return len(self.windows) * self.layer_bytes

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers that keep the same tokens, as the cache groups them."""
        return group_layers([window or None for window in self.windows])

    def split(self, ranks: int) -> Shape:
        """What each of ``ranks`` keeps under tensor parallelism; a latent cannot be split, and is kept by all."""
        if self.latent_dim or ranks == 1:
            return self
        if self.num_q_heads % ranks or max(self.num_kv_heads, ranks) % min(self.num_kv_heads, ranks):
            raise InvalidInput(f"{self.num_kv_heads} K/V and {self.num_q_heads} query heads do not split over {ranks}")
        heads = max(self.num_kv_heads // ranks, 1)
        return replace(self, num_kv_heads=heads, num_q_heads=self.num_q_heads // ranks)


def read_shape(path: Path, dtype: DType | None = None) -> Shape:
    """Of ``config.json``, or of the folder that holds it. ``dtype`` beats the one that it names.

    Raises ``InvalidInput`` that names the file and what is missing in it.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read {file}: {error}; give a model's config.json, or its figures by hand") from None
    if not isinstance(document, dict):
        raise InvalidInput(f"{file} must hold an object, got {type(document).__name__}")
    text = document.get("text_config")
    config = {**document, **text} if isinstance(text, dict) else document
    try:
        return _shape(config, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{file} describes no attention that is known here: {error}") from None


def _shape(config: Mapping[str, Any], dtype: DType | None) -> Shape:
    layers = _count(config, "num_hidden_layers", "n_layer", "num_layers")
    q_heads = _count(config, "num_attention_heads", "n_head")
    kv_heads = config.get("num_key_value_heads") or q_heads
    head_dim = config.get("head_dim") or _count(config, "hidden_size", "n_embd") // q_heads
    latent = config.get("kv_lora_rank") or 0
    return Shape(
        windows=_windows(config, layers),
        num_kv_heads=int(kv_heads),
        num_q_heads=q_heads,
        head_dim=int(head_dim),
        dtype=dtype or _dtype(config),
        max_context=config.get("max_position_embeddings") or config.get("n_positions"),
        latent_dim=latent + config["qk_rope_head_dim"] if latent else 0,
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window, kinds = config.get("sliding_window") or 0, config.get("layer_types")
    if isinstance(kinds, list):
        kept = [str(kind) for kind in kinds if not str(kind).startswith(KEEPS_NO_KV)]
        return tuple(window if kind == "sliding_attention" else 0 for kind in kept)
    if not config.get("use_sliding_window", True):
        window = 0
    every = config.get("sliding_window_pattern") or 0  # one layer in so many sees everything
    return tuple(0 if every and (layer + 1) % every == 0 else window for layer in range(layers))


def _dtype(config: Mapping[str, Any]) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or DType.bfloat16).removeprefix("torch.")
    if name not in [kind.value for kind in DType]:
        raise ValueError(f"its dtype {name!r} is none that blocks hold: give --dtype {', '.join(DType)}")
    return DType(name)


def _count(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise KeyError(f"it has no {' or '.join(names)}")
