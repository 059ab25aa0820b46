"""Attention written out one query and one head at a time, in float64: slow, short, and meant to be checked by eye."""

from __future__ import annotations

import numpy as np
import torch

from .interface import AttentionParams


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence whose last ``n`` of ``m`` tokens are the queries.

    ``query`` ``[n, num_q_heads, head_dim]``, ``key`` and ``value`` ``[m, num_kv_heads, head_dim]``, of any dtype and
    device. Returns float64 on the CPU: ``[n, num_q_heads, head_dim]`` and the log denominators ``[n, num_q_heads]``.
    """
    q, k, v = (tensor.detach().cpu().double().numpy() for tensor in (query, key, value))
    slopes, sinks = (
        None if tensor is None else tensor.detach().cpu().double().numpy()
        for tensor in (params.alibi_slopes, params.sinks)
    )
    num_queries, heads, dim = q.shape
    num_keys, kv_heads, _ = k.shape
    scale = dim**-0.5 if params.scale is None else params.scale
    out, lse = np.zeros(q.shape), np.full((num_queries, heads), -np.inf)
    for i in range(num_queries):
        position = num_keys - num_queries + i
        seen = np.array([j for j in range(num_keys) if _sees(position, j, params)], dtype=np.int64)
        for head in range(heads):
            kv_head = head * kv_heads // heads
            logits = scale * (k[seen, kv_head] @ q[i, head])
            if params.softcap is not None:
                logits = params.softcap * np.tanh(logits / params.softcap)
            if slopes is not None:
                logits = logits - slopes[head] * (position - seen)
            if sinks is not None:
                logits = np.append(logits, sinks[head])
            if len(logits) == 0:
                continue
            weights = np.exp(logits - logits.max())
            out[i, head] = weights[: len(seen)] @ v[seen, kv_head] / weights.sum()
            lse[i, head] = logits.max() + np.log(weights.sum())
    return torch.from_numpy(out), torch.from_numpy(lse)


def _sees(query_position: int, key_position: int, params: AttentionParams) -> bool:
    if params.causal and key_position > query_position:
        return False
    return params.window is None or key_position > query_position - params.window
