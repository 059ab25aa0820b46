"""pagemgr: the memory manager that an LLM inference engine embeds for its KV cache.

    cache = pagemgr.PagedKVCache(pagemgr.Config(...))       or pagemgr.open("pagemgr.toml")
    manager = pagemgr.BlockManager(num_blocks, block_size)  the allocator alone

What needs torch or pydantic is loaded when it is first used, so that the allocator alone needs neither.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    BackendUnavailable,
    ConfigError,
    InternalError,
    InvalidInput,
    NativeAbiMismatch,
    OperatingError,
    OutOfBlocks,
    OutOfSequences,
    PagemgrError,
    SequenceBusy,
    SequenceTooLong,
    StaleSequence,
    StepOrderError,
    TransferFailed,
    UnsupportedFeature,
    UsageError,
    WrongProcess,
    WrongTier,
)
from .manager import BlockManager
from .prefix import Namespace
from .sequences import Batch, Sequence
from .stats import Stats

if TYPE_CHECKING:
    from .backends.interface import AttentionParams
    from .cache import PagedKVCache, Step
    from .cache import open_cache as open
    from .config import Config, ModelConfig, PoolConfig

__version__ = "0.1.0"

__all__ = [
    "AttentionParams",
    "BackendUnavailable",
    "Batch",
    "BlockManager",
    "Config",
    "ConfigError",
    "InternalError",
    "InvalidInput",
    "ModelConfig",
    "Namespace",
    "NativeAbiMismatch",
    "OperatingError",
    "OutOfBlocks",
    "OutOfSequences",
    "PagedKVCache",
    "PagemgrError",
    "PoolConfig",
    "Sequence",
    "SequenceBusy",
    "SequenceTooLong",
    "StaleSequence",
    "Stats",
    "Step",
    "StepOrderError",
    "TransferFailed",
    "UnsupportedFeature",
    "UsageError",
    "WrongProcess",
    "WrongTier",
    "open",
]

_LAZY = {
    "AttentionParams": ("backends.interface", "AttentionParams"),
    "Config": ("config", "Config"),
    "ModelConfig": ("config", "ModelConfig"),
    "PagedKVCache": ("cache", "PagedKVCache"),
    "PoolConfig": ("config", "PoolConfig"),
    "Step": ("cache", "Step"),
    "open": ("cache", "open_cache"),
}

logging.getLogger("pagemgr").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'pagemgr' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
