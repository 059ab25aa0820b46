"""Every setting there is: one tree, frozen, and refused at construction if it cannot work.

    TOML file  <  PAGEMGR_* environment  <  overrides (command line flags)        each source beats those left of it

    [pool]                              PAGEMGR_POOL__SIZE=4GiB                   --pool.size 4GiB
    size = "4GiB"

The attribute docstrings below are the help of the command line flags and the descriptions in the JSON schema. No
other module reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError, InvalidInput
from .layout import BlockLayout, DType, KVDType, LayerGroup, group_layers
from .native.build import DEFAULT_CACHE_DIR
from .sources import Source, explain, from_environ, from_file, from_flags, leaves, merge, nested, refuse_unknown
from .values import (
    INT32_MAX,
    Bytes,
    Count,
    Device,
    Fraction,
    Key,
    Name,
    Policy,
    Share,
    Token,
    Whole,
    Windows,
    parse_bytes,
)

MAX_SEQ_LEN_CAP = 131_072
"""Tokens; the longest sequence unless ``pool.max_seq_len`` says otherwise, so that a large pool keeps narrow tables."""

ENV_PREFIX = "PAGEMGR_"

_CHOICES = (("num_blocks", "size", "memory_share"), ("host_blocks", "host_size"))
"""Settings of the pool that exclude each other: a source that sets one replaces whichever a weaker source set."""


class _Section(BaseModel):
    """Frozen, knows no key but its own, and says ``ConfigError`` where pydantic says ``ValidationError``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers keep the signature that the fields give

        def __init__(self, **values: object) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(explain(type(self), error)) from None

        # Without this mark pydantic would build nested sections through __init__ too, and stop at the first bad one.
        __init__.__pydantic_base_init__ = True


class ModelConfig(_Section):
    """The model whose keys and values are kept."""

    num_layers: Count
    """Layers that keep K and V."""
    num_kv_heads: Count
    """K/V heads of a layer, on this rank."""
    head_dim: Count
    """Elements of one head."""
    num_q_heads: Count = Field(default_factory=lambda data: data.get("num_kv_heads", 1))
    """Query heads of a layer, on this rank: a multiple of num_kv_heads, and equal to it unless given."""
    dtype: DType = DType.float32
    """Element type of queries, keys, values and outputs."""
    kv_dtype: KVDType = KVDType.auto
    """Element type that K and V are stored as: auto, which is dtype, or a quantised one of one byte with a scale for
    each token and head, set when it is written."""
    windows: Windows = ()
    """Tokens that each layer sees, 0 for all; a shorter list repeats: 512,512,512,512,512,0 is five layers with a
    sliding window for each with full attention. Layers that keep the same tokens share blocks. Full attention unless
    given."""

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if len(self.windows) > self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers = {self.num_layers}")
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_q_heads = {self.num_q_heads} is no multiple of num_kv_heads = {self.num_kv_heads}")
        if self.kv_dtype is not KVDType.auto and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, which kv_dtype = {self.kv_dtype.value!r} cannot be")
        return self


class PoolConfig(_Section):
    """How large the pool is: exactly one of num_blocks, size and memory_share. All count the reserved null block."""

    block_size: Count = 16
    """Tokens of one block."""
    num_blocks: Annotated[Whole, Field(ge=2)] | None = None
    """Blocks on the device."""
    size: Bytes | None = None
    """Bytes on the device, such as "4GiB"."""
    memory_share: Share | None = None
    """Share of the device memory that is free when the pool is made, above 0 and at most 1."""
    max_sequences: Count = 256
    """Sequences at the same time: rows of the block table."""
    max_seq_len: Count | None = None
    """Tokens of the longest sequence: what the whole pool can hold, at most 131072, unless given."""
    host_blocks: Whole | None = None
    """Blocks in host memory to swap to: 0, which is no swapping, unless given."""
    host_size: Bytes | None = None
    """Bytes in host memory to swap to, such as "16GiB", instead of host_blocks."""
    host_cache: Literal["off", "inclusive", "exclusive"] = "off"
    """Whether evicted blocks go down to host memory and come up when a prompt needs them, and whether they then stay
    there as well (inclusive) or leave room for others (exclusive)."""
    watermark: Fraction = 0.0
    """Share of the blocks that a new sequence must leave for those that run."""
    rollback: Whole = 64
    """Tokens by which a sequence can be cut back at any time though some layers have a sliding window."""

    @model_validator(mode="after")
    def _one_size_each(self) -> Self:
        for choice in _CHOICES:
            given = [f"{name} = {value!r}" for name in choice if (value := getattr(self, name)) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} exclude each other: set one of {', '.join(choice)}")
            if not given and choice is _CHOICES[0]:
                raise ValueError(f"its size is missing: set one of {', '.join(choice)}")
        if self.host_blocks == 1:
            raise ValueError("host_blocks = 1 holds nothing, as block 0 is reserved: set 0, or at least 2")
        return self


class PrefixConfig(_Section):
    """Reuse of the blocks of earlier sequences with the same beginning."""

    enabled: bool = True
    """Match new sequences against cached prefixes."""
    partial_hits: bool = True
    """Reuse the beginning of one more block after the whole ones, by copying it."""
    verify_hits: bool = False
    """Compare token ids on a hit, and not names alone."""
    secret: Key | None = None
    """Key of the names of prefixes, 16 to 64 bytes, so that nobody without it can tell what a name stands for."""
    pin_share: Fraction = 0.25
    """Share of the device blocks that one owner may pin."""


class EvictionConfig(_Section):
    """Which cached blocks are given up first."""

    policy: Policy = "lru"
    """Name of the eviction policy: lru, lfu, s3fifo, hit_density, or one from the entry points of pagemgr.eviction."""


class MetricsConfig(_Section):
    """Where Prometheus reads the metrics."""

    host: Name = "127.0.0.1"
    """Address that /metrics listens on."""
    port: Annotated[Whole, Field(le=65535)] | None = None
    """Port that /metrics listens on; 0 takes a free one. Nothing listens unless given."""
    pool: Name = "default"
    """Value of the label "pool", to tell the pools of one process apart."""
    timings: bool = True
    """Measure how long swaps, some of the steps and one layer of each of these take."""
    vllm_names: bool = False
    """Report under vLLM's names as well what means the same, so that dashboards and routers made for it work."""


class ServiceConfig(_Section):
    """Where the page, the JSON API and the metrics are served by "pagemgr serve" and PagedKVCache.serve."""

    host: Name = "127.0.0.1"
    """Address to listen on. Whoever reaches it can read the state of the pool."""
    port: Annotated[Whole, Field(le=65535)] = 8620
    """Port to listen on; 0 takes a free one."""
    token: Token | None = None
    """What a client must know to change anything; nothing can be changed unless given. Other users of the machine see
    what is typed: say it in the variable PAGEMGR_SERVICE__TOKEN or in a file."""


class NativeConfig(_Section):
    """Compiled kernels. To use a library of your own, give its path as the backend."""

    cache_dir: Name = DEFAULT_CACHE_DIR
    """Folder that keeps the libraries that are built on first use."""


class DebugConfig(_Section):
    """What helps to find out what went wrong."""

    level: Annotated[Whole, Field(le=3)] = 1
    """How closely the pool is watched: 0 counts only; 1 checks in constant time; 2 poisons freed blocks and sees that
    nobody writes to them; 3 reuses blocks as late as can be and tells what happened to them."""
    record: Name | None = None
    """New file that every call of the manager is written to, for "pagemgr replay". It will hold all token ids."""


class Config(_Section):
    """All settings of one cache."""

    model: ModelConfig
    pool: PoolConfig
    device: Device = "auto"
    """Where the blocks live: "cpu", "cuda", "cuda:1", or "auto", which is cuda where there is one."""
    backend: Name = "auto"
    """What computes attention: a name that "pagemgr doctor" lists, "auto", which is the best that can run, or the path
    of a library of your own that implements native/pagemgr_abi.h, such as "./libmine.so"."""
    prefix: PrefixConfig = PrefixConfig()
    eviction: EvictionConfig = EvictionConfig()
    metrics: MetricsConfig = MetricsConfig()
    service: ServiceConfig = ServiceConfig()
    native: NativeConfig = NativeConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.pool.memory_share is None:
            self.resolve_max_seq_len(self.resolve_num_blocks())
        self.resolve_host_blocks()
        return self

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """The settings of a TOML file, the environment and ``overrides`` (dotted keys), each beating the one before."""
        return load(path, overrides, environ).config

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers by the tokens that they keep."""
        model = self.model
        windows = model.windows or (0,)
        return group_layers([windows[layer % len(windows)] or None for layer in range(model.num_layers)])

    @property
    def layout(self) -> BlockLayout:
        """Shape and bytes of one block, which holds the layers of one group."""
        model, layers = self.model, len(self.layer_groups[0].layers)
        return BlockLayout(
            layers, model.num_kv_heads, model.head_dim, self.pool.block_size, model.dtype, model.kv_dtype
        )

    def resolve_num_blocks(self, free_device_bytes: int | None = None) -> int:
        """Blocks of the device tier, the null block included.

        ``free_device_bytes`` is needed for ``pool.memory_share`` alone. ``ConfigError`` if the pool would be too small.
        """
        pool = self.pool
        if pool.num_blocks is not None:
            return pool.num_blocks
        if pool.size is not None:
            return self._blocks_in(f"pool.size = {pool.size!r}", parse_bytes(pool.size))
        assert pool.memory_share is not None  # exactly one of the three is set
        if free_device_bytes is None:
            raise InvalidInput(f"pool.memory_share = {pool.memory_share} needs free_device_bytes to become blocks")
        setting = f"pool.memory_share = {pool.memory_share} of {free_device_bytes} free bytes"
        return self._blocks_in(setting, int(free_device_bytes * pool.memory_share))

    def resolve_host_blocks(self) -> int:
        """Blocks of the host tier, the null block included; 0 is no host tier."""
        if self.pool.host_size is None:
            return self.pool.host_blocks or 0
        size = parse_bytes(self.pool.host_size)
        return self._blocks_in(f"pool.host_size = {self.pool.host_size!r}", size) if size else 0

    def resolve_max_seq_len(self, num_blocks: int) -> int:
        """Tokens of the longest sequence in a device tier of ``num_blocks``."""
        usable = (num_blocks - 1) * self.pool.block_size
        wanted = self.pool.max_seq_len
        if wanted is None:
            return min(usable, MAX_SEQ_LEN_CAP)
        if wanted > usable:
            raise ConfigError(
                f"pool.max_seq_len = {wanted} tokens is more than the pool holds: {num_blocks} blocks of "
                f"{self.pool.block_size} tokens less the reserved one are {usable} tokens. Lower it to {usable}, or "
                f"give the pool {self.layout.blocks_for(wanted) + 1} blocks"
            )
        return wanted

    def _blocks_in(self, setting: str, size: int) -> int:
        block = self.layout.block_bytes
        count = size // block
        if count < 2:
            raise ConfigError(
                f"{setting} is {size} bytes, too little for 2 blocks (one is reserved): a block is {block} bytes, "
                f"so give at least {2 * block} bytes"
            )
        if count > INT32_MAX:
            raise ConfigError(
                f"{setting} is {count} blocks of {block} bytes, more than int32 block ids can name ({INT32_MAX}): "
                "raise pool.block_size"
            )
        return count


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config, and for every dotted key where its value came from: a path, a variable, a flag, or "default"."""

    config: Config
    origins: Mapping[str, str]


def load(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """As ``Config.load``, and remembers where each value came from. ``environ`` is the process's unless given."""
    merged = _merged(path, overrides, environ)
    origins = {key: origin for key, (_, origin) in merged.items()}
    try:
        config = Config.model_validate(nested(Config, merged))
    except ValidationError as error:
        raise ConfigError(explain(Config, error, origins)) from None
    return Loaded(config, {key: origins.get(key, "default") for key, _ in leaves(Config)})


def load_native(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> NativeConfig:
    """The section ``native`` of the same sources, for what makes no cache: other sections may be incomplete."""
    merged = _merged(path, overrides, environ)
    section = nested(Config, merged)["native"]
    try:
        return NativeConfig.model_validate(section)
    except ValidationError as error:
        raise ConfigError(explain(NativeConfig, error)) from None


def _merged(
    path: str | os.PathLike[str] | None, overrides: Mapping[str, object] | None, environ: Mapping[str, str] | None
) -> Source:
    merged = merge(
        (
            from_file(Config, path),
            from_environ(os.environ if environ is None else environ, ENV_PREFIX),
            from_flags(overrides or {}),
        ),
        exclusive=[{f"pool.{name}" for name in names} for names in _CHOICES],
    )
    refuse_unknown(Config, merged)
    return merged
