"""``attention``: short queries to ``decode``, long ones to ``prefill``, a mixed batch to both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .call import Tensors
from .decode import decode
from .device import multiprocessors
from .launch import Launch, launch_all
from .prefill import prefill
from .sizes import DECODED_ROWS, pays_to_cut, power_of_two, prefill_sizes
from .widen import Widening, widening


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of ``attention`` but for the memory of its tensors: the layers of a step ask for the same.

    It holds what makes it valid by identity, so that nothing else can take that name.
    """

    batch: PagedBatch
    params: AttentionParams
    launches: list[Launch]
    scratch_words: int = 0
    widening: Widening | None = None

    def __call__(self, query: torch.Tensor, kv: KVLayer, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Launch. Scratch memory is taken anew, so that it belongs to the graph that a launch is captured in."""
        scratch = None
        if self.scratch_words:
            scratch = torch.empty(self.scratch_words, dtype=torch.float32, device=query.device)
        table = self.batch.block_table
        tensors = Tensors(query, out, kv.key, kv.value, lse, kv.key_scale, kv.value_scale, table, scratch)
        if self.widening is not None:
            tensors = self.widening(tensors)
        launch_all(self.launches, tensors, query.device)


def prepare(query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams, with_lse: bool) -> Prepared:
    """For tensors of these shapes, strides and types; arguments as in ``Backend.attention``, checked.

    What is launched depends on shapes and the batch's maxima alone, and either kernel finds its own sequences on the
    device: a captured launch serves any batch within them.
    """
    if query.shape[0] == 0:
        return Prepared(batch, params, [])
    group = query.shape[1] // kv.key.shape[1]
    if batch.max_query_len * group <= max(DECODED_ROWS, group):
        launches, words = decode(query, kv, batch, params, with_lse, most_new=max(batch.max_query_len, 1))
        return Prepared(batch, params, launches, words)
    if query.shape[0] == batch.num_seqs * batch.max_query_len:  # all alike, so that none is short
        return _prepare_long(query, kv, batch, params, with_lse)
    most_new = max(16 // group, 1)
    launches, words = decode(query, kv, batch, params, with_lse, most_new)
    launches.append(prefill(query, kv, batch, params, with_lse, least_new=most_new + 1))
    return Prepared(batch, params, launches, words)


def _prepare_long(
    query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams, with_lse: bool
) -> Prepared:
    _, heads, dim = query.shape
    kv_heads = kv.key.shape[1]
    sizes = prefill_sizes(query.dtype, power_of_two(dim))
    query_tiles = batch.num_seqs * -(-batch.max_query_len // (sizes.rows * kv_heads // heads))
    wide = widening(query, kv, batch, params.window, query_tiles // batch.num_seqs)
    given = batch
    if wide is not None:
        kv, batch = wide.kv, replace(batch, block_table=wide.table)
    seen = batch.max_seq_len if params.window is None else min(batch.max_seq_len, params.window + batch.max_query_len)
    if pays_to_cut(query_tiles * kv_heads, -(-seen // sizes.tile), multiprocessors(query.device)):
        launches, words = decode(query, kv, batch, params, with_lse, most_new=batch.max_query_len)
    else:
        launches, words = [prefill(query, kv, batch, params, with_lse, least_new=1)], 0
    return Prepared(given, params, launches, words, wide)
