"""pagemgr: the memory manager that an LLM inference engine embeds for its KV cache.

    cache = pagemgr.PagedKVCache(pagemgr.Config(...))      or pagemgr.open("pagemgr.toml")
    manager = pagemgr.BlockManager(num_blocks, block_size) the allocator alone, without torch

Names are loaded when they are first used, so that the manager alone never imports torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends.interface import AttentionParams
    from .cache import PagedKVCache, Step
    from .cache import open_cache as open
    from .config import Config
    from .errors import (
        BackendUnavailable,
        ConfigError,
        InternalError,
        InvalidInput,
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
        WrongTier,
    )
    from .manager import BlockManager
    from .prefix import Namespace
    from .sequences import Sequence
    from .stats import Stats

__version__ = "0.1.0"

_HOMES = {
    "AttentionParams": ".backends.interface",
    "PagedKVCache": ".cache",
    "Step": ".cache",
    "open": ".cache:open_cache",
    "Config": ".config",
    "BackendUnavailable": ".errors",
    "ConfigError": ".errors",
    "InternalError": ".errors",
    "InvalidInput": ".errors",
    "OperatingError": ".errors",
    "OutOfBlocks": ".errors",
    "OutOfSequences": ".errors",
    "PagemgrError": ".errors",
    "SequenceBusy": ".errors",
    "SequenceTooLong": ".errors",
    "StaleSequence": ".errors",
    "StepOrderError": ".errors",
    "TransferFailed": ".errors",
    "UnsupportedFeature": ".errors",
    "UsageError": ".errors",
    "WrongTier": ".errors",
    "BlockManager": ".manager",
    "Namespace": ".prefix",
    "Sequence": ".sequences",
    "Stats": ".stats",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604

logging.getLogger("pagemgr").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pagemgr' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module, __name__), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
