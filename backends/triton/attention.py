"""``attention``: short queries to ``decode``, long ones to ``prefill``, a mixed batch to both."""

from __future__ import annotations

import torch

from pagemgr.backends.interface import AttentionParams, KVLayer
from pagemgr.batch import PagedBatch

from .decode import decode
from .prefill import prefill

DECODED_ROWS = 64
"""Query rows (new tokens times query heads per K/V head) up to which a sequence is decoded."""


def attention(
    query: torch.Tensor,
    kv: KVLayer,
    batch: PagedBatch,
    params: AttentionParams,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Launch; arguments as in ``Backend.attention``, checked.

    What is launched depends on shapes and the batch's maxima alone, and either kernel finds its own sequences on the
    device: a captured launch serves any batch within them.
    """
    if query.shape[0] == 0:
        return
    group = query.shape[1] // kv.key.shape[1]
    if batch.max_query_len * group <= max(DECODED_ROWS, group):
        decode(query, kv, batch, params, out, lse, most_new=max(batch.max_query_len, 1))
    elif query.shape[0] == batch.num_seqs * batch.max_query_len:  # all alike, so none is short
        prefill(query, kv, batch, params, out, lse, least_new=1)
    else:
        most_new = max(16 // group, 1)
        decode(query, kv, batch, params, out, lse, most_new)
        prefill(query, kv, batch, params, out, lse, least_new=most_new + 1)
