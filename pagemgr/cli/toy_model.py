"""The demo's model: random weights, but a transformer all the same.

Its keys and values depend on every token before and on every block they were read from, so that one wrong block
anywhere changes what comes out. The same code runs on the paged cache and, to verify it, without any cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagemgr.backends.interface import AttentionParams
from pagemgr.backends.oracle import dense_attention
from pagemgr.config import ModelConfig

VOCABULARY = 512

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, query, key, value) → output, shaped as in ``Step.attention``."""


@dataclass(frozen=True, slots=True)
class ToyModel:
    """Embedding and, per layer, attention, a projection, a residual and a norm."""

    embedding: torch.Tensor
    """``[VOCABULARY, width]``; also turns hidden states into logits."""
    positions: torch.Tensor
    """``[max_seq_len, width]``."""
    layers: tuple[tuple[torch.Tensor, ...], ...]
    """Per layer, the projections to query, key and value, and from the output."""
    head_dim: int

    @classmethod
    def random(cls, model: ModelConfig, max_seq_len: int, seed: int) -> ToyModel:
        """Weights in float64, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        width, kv_width = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        embedding, positions = normal(VOCABULARY, width, 1.0), normal(max_seq_len, width, 1.0)
        layers = tuple(
            tuple(normal(width, columns, width**-0.5) for columns in (width, kv_width, kv_width, width))
            for _ in range(model.num_layers)
        )
        return cls(embedding, positions, layers, model.head_dim)

    def to(self, dtype: torch.dtype) -> ToyModel:
        """The same weights in another precision."""
        layers = tuple(tuple(weight.to(dtype) for weight in layer) for layer in self.layers)
        return ToyModel(self.embedding.to(dtype), self.positions.to(dtype), layers, self.head_dim)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states ``[num_tokens, width]`` of these tokens at these positions, both int64 ``[num_tokens]``."""
        x = self.embedding[tokens] + self.positions[positions]
        for number, (wq, wk, wv, wo) in enumerate(self.layers):
            query, key, value = ((x @ weight).view(len(x), -1, self.head_dim) for weight in (wq, wk, wv))
            x = x + attend(number, query, key, value).flatten(1) @ wo
            x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True))
        return x

    def run_dense(self, tokens: list[int]) -> torch.Tensor:
        """Hidden state ``[width]`` of the last of these tokens, computed from scratch by the written-out formula."""
        ids, params = torch.tensor(tokens), AttentionParams()
        return self.run(ids, torch.arange(len(ids)), lambda _, q, k, v: dense_attention(q, k, v, params)[0])[-1]
