"""``PerFeature``: what ``"auto"`` gives where the best backend lacks an optional feature that the next ones have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from pagemgr.batch import PagedBatch

from .interface import AttentionParams, Backend, Capabilities, Feature, KVLayer

_log = logging.getLogger("pagemgr.backends")


class PerFeature:
    """Several backends over one pool, best first: each call of ``attention`` goes to the first that can do it.

    That works as all read and write the same layout. Everything else is done by the first.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._first = backends[0]
        self._backends = tuple(backends)
        self._chosen: dict[frozenset[Feature], Backend] = {}
        self.name = "+".join(backend.name for backend in backends)

    @classmethod
    def probe(cls) -> str | None:
        """It is made of backends that can run."""
        return None

    def capabilities(self) -> Capabilities:
        """The first one's, with the features of all."""
        declared = [backend.capabilities() for backend in self._backends]
        return replace(
            declared[0],
            features=frozenset().union(*(one.features for one in declared)),
            graph_capture=all(one.graph_capture for one in declared),
        )

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        self._first.write_kv(key, value, kv, slot_mapping)

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Backend.attention``."""
        needs = params.features(with_lse=lse is not None)
        backend = self._chosen.get(needs) or self._choose(needs)
        return backend.attention(query, kv, batch, params, out, lse)

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        self._first.copy_blocks(source, target, pairs)

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Backend.merge``."""
        return self._first.merge(outs, lses)

    def _choose(self, needs: frozenset[Feature]) -> Backend:
        """The first refuses, in its own words, what none can do."""
        able = [backend for backend in self._backends if needs <= backend.capabilities().features]
        chosen = self._chosen[needs] = able[0] if able else self._first
        if chosen is not self._first:
            lacking = ", ".join(sorted(needs - self._first.capabilities().features))
            _log.info("attention with %s is done by %s, as %s has it not", lacking, chosen.name, self._first.name)
        return chosen
