"""Tiny causal LMs with random weights, shaped like real ones: grouped heads, windows, softcap, sinks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the adapter needs transformers")

VOCABULARY = 97
WINDOW = 7
LAYERS = 3
PADDING = 0

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.25,  # far from 0, so that attention decides what comes next
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PADDING,
}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

SHAPES = {
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma3": ("Gemma3TextConfig", _WINDOWS),
    "Gemma2": ("Gemma2Config", _WINDOWS | {"attn_logit_softcapping": 5.0}),
    "GptOss": ("GptOssConfig", _WINDOWS | _EXPERTS),
}
"""Name → class of the config, and what it has beyond the common shape."""


@cache
def tiny_model(name: str) -> Any:
    """The same weights whenever it is asked for."""
    config_name, more = SHAPES[name]
    config = getattr(transformers, config_name)(**_SHAPE, **more)
    torch.manual_seed(11)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def left_padded(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens ``[rows, longest]``, and the mask that says where they begin."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator)
    return torch.where(mask.bool(), ids, PADDING), mask
