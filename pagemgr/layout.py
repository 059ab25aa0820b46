"""Shapes, strides and bytes of K/V blocks. Knows neither tensors nor torch.

Block-major: one block holds all layers contiguously, so that moving a block is one large copy, and within a layer
the order is [role][head][token][dim], so that the tokens of one (block, head) are one contiguous run.

    tier   [num_blocks][num_layers][role: key, value][num_kv_heads][block_size][head_dim]
           └─ block ──┘└─ layer ──┘└─ role ─────────┘└─ head ─────┘└─ token ──┘└─ dim ──┘

Quantised, a layer goes on with its scales, ``[key, value][num_kv_heads][block_size]``: they are part of the block, and
whatever moves a block moves them.

Kernels receive a base pointer and these strides, and never assume that one layer is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .errors import InvalidInput

NULL_BLOCK = 0
"""Block 0 of the device tier is reserved: it pads block tables, is zero, and belongs to nobody."""

PADDING_SLOT = -1
"""A slot mapping entry that writes nothing."""


SCALE_BYTES = 4
"""Of one scale, a float32."""


class DType(StrEnum):
    """Element types of queries, new keys and values, and outputs, named as torch names them."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.float32 else 2


class KVDType(StrEnum):
    """How a block holds keys and values: as they come, or as one byte an element, named as torch names its type.

    Then there is a scale for each token, head, and key or value, set when it is written: largest magnitude of the
    head's elements over the largest that the type represents.
    """

    auto = "auto"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e5m2 = "float8_e5m2"
    int8 = "int8"


class Role(StrEnum):
    """What a part of a layer holds. A latent would be one more role, not one more allocator."""

    key = "key"
    value = "value"
    scale = "scale"


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The shape of one block: layers (those of one group) × roles × K/V heads × tokens × elements of a head.

    ``dtype`` is that of queries, new keys and values, and outputs.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: DType = DType.float32
    kv_dtype: KVDType = KVDType.auto

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}")
        if self.quantised and self.head_dim % 2:
            raise InvalidInput(f"head_dim must be even for kv_dtype {self.kv_dtype}, got {self.head_dim}")

    @property
    def quantised(self) -> bool:
        """Whether there are scales."""
        return self.kv_dtype is not KVDType.auto

    @property
    def stored(self) -> str:
        """Torch's name for the type of the elements that a block holds."""
        return (self.kv_dtype if self.quantised else self.dtype).value

    @property
    def roles(self) -> Mapping[Role, int]:
        """The parts of a layer in storage order, with the bytes of one token in one layer."""
        row = self.num_kv_heads * self.head_dim * (1 if self.quantised else self.dtype.itemsize)
        scales = {Role.scale: 2 * self.num_kv_heads * SCALE_BYTES} if self.quantised else {}
        return {Role.key: row, Role.value: row} | scales

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the keys of one layer of a block, and of the values: (num_kv_heads, block_size, head_dim), contiguous."""
        return (self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block, all roles."""
        return self.block_size * sum(self.roles.values())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers and roles."""
        return self.num_layers * sum(self.roles.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers and roles."""
        return self.token_bytes * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same tokens: the last ``window`` of them, or all.

    Layer ``layers[i]`` of the model is layer ``i`` of a block of this group.
    """

    window: int | None
    layers: tuple[int, ...]


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups of as many layers as a block holds, full attention first; the first group fills its blocks.

    ``windows[i]`` is the window of layer ``i`` in tokens. Blocks of all groups are alike, so that they draw on one
    pool; the last group of a kind may leave layers of its blocks unused. The largest blocks are chosen that leave
    unused no more than a sixteenth of what is kept.
    """
    kinds = sorted(set(windows), key=lambda window: -(window or 2**62))
    members = {kind: [layer for layer, window in enumerate(windows) if window == kind] for kind in kinds}
    size = next(
        size
        for size in range(min(map(len, members.values())), 0, -1)
        if 16 * sum(-len(layers) % size for layers in members.values()) <= len(windows)
    )
    return tuple(
        LayerGroup(kind, tuple(layers[start : start + size]))
        for kind, layers in members.items()
        for start in range(0, len(layers), size)
    )
