"""The oracle against what others wrote: torch's SDPA, and the eager attention of transformers' models."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pagemgr.backends import AttentionParams
from pagemgr.backends.oracle import dense_attention

NEW, TOTAL, HEADS, KV_HEADS, DIM = 11, 19, 6, 2, 8


@pytest.fixture(params=range(3), ids="seed-{}".format)
def tensors(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    query = torch.randn(NEW, HEADS, DIM, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, TOTAL, KV_HEADS, DIM, generator=generator, dtype=torch.float64)
    return query, key, value


def batched(tensor: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, dim]`` to ``[1, heads, tokens, dim]``."""
    return tensor.transpose(0, 1).unsqueeze(0)


def visible(causal: bool, window: int | None) -> torch.Tensor:
    """``[NEW, TOTAL]``, drawn by torch's own triangles."""
    mask = torch.ones(NEW, TOTAL, dtype=torch.bool)
    if causal:
        mask = mask.tril(TOTAL - NEW)
    return mask if window is None else mask.triu(TOTAL - NEW - window + 1)


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None, None]


def module(**more: object) -> SimpleNamespace:
    """What an eager attention function reads of its layer."""
    return SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False, head_dim=DIM, **more)


def model_of(name: str) -> ModuleType:
    path = f"transformers.models.{name}.modeling_{name}"
    return pytest.importorskip(path, reason="transformers is not installed")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_torch_sdpa(tensors, causal: bool, window: int | None, scale: float | None) -> None:
    mask = visible(causal, window)
    expected = scaled_dot_product_attention(*map(batched, tensors), attn_mask=mask, scale=scale, enable_gqa=True)
    out, _ = dense_attention(*tensors, AttentionParams(scale=scale, causal=causal, window=window))
    torch.testing.assert_close(batched(out), expected, rtol=1e-12, atol=1e-12)


def test_log_denominator(tensors) -> None:
    query, key, _ = tensors
    scores = torch.einsum("nhd,mhd->nhm", query, key.repeat_interleave(HEADS // KV_HEADS, dim=1)) * DIM**-0.5
    expected = scores.masked_fill(~visible(True, 5)[:, None], -torch.inf).logsumexp(-1)
    _, lse = dense_attention(*tensors, AttentionParams(window=5))
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)


def test_transformers_window() -> None:
    masking = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")
    sees = masking.sliding_window_causal_mask_function(4)
    query, key = torch.arange(TOTAL - NEW, TOTAL)[:, None], torch.arange(TOTAL)
    assert torch.equal(torch.as_tensor(sees(0, 0, query, key)), visible(True, 4))


def test_gemma2_softcap(tensors) -> None:
    gemma2 = model_of("gemma2")
    mask = additive(visible(True, 4))
    expected, _ = gemma2.eager_attention_forward(module(), *map(batched, tensors), mask, scaling=0.6, softcap=0.9)
    out, _ = dense_attention(*tensors, AttentionParams(scale=0.6, window=4, softcap=0.9))
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)  # its softmax is float32


def test_gpt_oss_sinks(tensors) -> None:
    gpt_oss = model_of("gpt_oss")
    sinks = torch.linspace(-2, 3, HEADS)
    mask = additive(visible(True, 4))
    layer = module(sinks=sinks.double())
    expected, _ = gpt_oss.eager_attention_forward(layer, *map(batched, tensors), mask, scaling=DIM**-0.5)
    out, _ = dense_attention(*tensors, AttentionParams(window=4, sinks=sinks))
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)


def test_bloom_alibi(tensors) -> None:
    """Bloom's bias counts from the first key, ours from the query: one constant a row, which a softmax cannot see."""
    bloom = model_of("bloom")
    bias = bloom.build_alibi_tensor(torch.ones(1, TOTAL, dtype=torch.int64), HEADS, torch.float64)[None]
    slopes = bias[0, :, 0, 1].float()
    mask = additive(visible(True, None)) + bias
    expected = scaled_dot_product_attention(*map(batched, tensors), attn_mask=mask, enable_gqa=True)
    out, _ = dense_attention(*tensors, AttentionParams(alibi_slopes=slopes))
    torch.testing.assert_close(batched(out), expected, rtol=1e-6, atol=1e-7)  # slopes are float32


def test_a_query_without_keys() -> None:
    query, nothing = torch.ones(2, HEADS, DIM), torch.ones(0, KV_HEADS, DIM)
    out, lse = dense_attention(query, nothing, nothing, AttentionParams())
    assert not out.any()
    assert torch.equal(lse, torch.full((2, HEADS), -torch.inf, dtype=torch.float64))
    sinks = torch.arange(HEADS, dtype=torch.float32)
    out, lse = dense_attention(query, nothing, nothing, AttentionParams(sinks=sinks))
    assert not out.any()
    assert torch.equal(lse, sinks.double().expand(2, -1))
