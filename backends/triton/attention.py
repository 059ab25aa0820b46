"""``attention``: short queries to ``decode``, long ones to ``prefill``, a mixed batch to both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .call import Tensors
from .decode import decode
from .device import multiprocessors
from .launch import Launch, launch_all
from .prefill import prefill
from .sizes import DECODED_ROWS, pays_to_cut, power_of_two, prefill_sizes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of ``attention`` but for the memory of its tensors: the layers of a step ask for the same.

    It holds what makes it valid by identity, so that nothing else can take that name.
    """

    batch: PagedBatch
    params: AttentionParams
    launches: list[Launch]
    scratch_words: int

    def __call__(self, query: torch.Tensor, kv: KVLayer, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Launch. Scratch memory is taken anew, so that it belongs to the graph that a launch is captured in."""
        scratch = None
        if self.scratch_words:
            scratch = torch.empty(self.scratch_words, dtype=torch.float32, device=query.device)
        tensors = Tensors(query, out, kv.key, kv.value, lse, kv.key_scale, kv.value_scale, scratch)
        launch_all(self.launches, tensors, query.device)


def prepare(query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams, with_lse: bool) -> Prepared:
    """For tensors of these shapes, strides and types; arguments as in ``Backend.attention``, checked.

    What is launched depends on shapes and the batch's maxima alone, and either kernel finds its own sequences on the
    device: a captured launch serves any batch within them.
    """
    if query.shape[0] == 0:
        return Prepared(batch, params, [], 0)
    group, alike = query.shape[1] // kv.key.shape[1], query.shape[0] == batch.num_seqs * batch.max_query_len
    if batch.max_query_len * group <= max(DECODED_ROWS, group) or (alike and _leaves_room(query, kv, batch)):
        launches, words = decode(query, kv, batch, params, with_lse, most_new=max(batch.max_query_len, 1))
    elif alike:  # so that none is short
        launches, words = [prefill(query, kv, batch, params, with_lse, least_new=1)], 0
    else:
        most_new = max(16 // group, 1)
        launches, words = decode(query, kv, batch, params, with_lse, most_new)
        launches.append(prefill(query, kv, batch, params, with_lse, least_new=most_new + 1))
    return Prepared(batch, params, launches, words)


def _leaves_room(query: torch.Tensor, kv: KVLayer, batch: PagedBatch) -> bool:
    """Whether ``prefill`` would leave multiprocessors idle that could walk a part of the keys."""
    _, heads, dim = query.shape
    kv_heads = kv.key.shape[1]
    sizes = prefill_sizes(query.dtype, power_of_two(dim))
    items = batch.num_seqs * kv_heads * -(-batch.max_query_len // (sizes.rows * kv_heads // heads))
    return pays_to_cut(items, -(-batch.max_seq_len // sizes.tile), multiprocessors(query.device))
