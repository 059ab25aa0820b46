"""What a PagedCache cannot do right it refuses, and whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, VOCABULARY, left_padded, tiny_model
from transformers import (
    DynamicCache,
    Gemma3nTextConfig,
    Llama4TextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from pagemgr.backends.interface import AttentionParams
from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import ConfigError, InvalidInput, OutOfBlocks, OutOfSequences
from pagemgr.integrations.rows import PaddedRows
from pagemgr.integrations.transformers import NAME, PagedCache, PlainMask, layer_windows, model_config, paged_mask

IDS, MASK = left_padded([10, 10], seed=1)


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_model("Llama")
    model.set_attn_implementation(NAME)
    return model


@pytest.fixture
def cache(model: PreTrainedModel) -> PagedCache:
    return PagedCache.for_model(model, "torch", num_blocks=33, block_size=4)


def run(model: PreTrainedModel, cache: Any, ids: torch.Tensor = IDS, mask: Any = MASK, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache, **more).logits


def used(cache: PagedCache) -> int:
    cache.pool.manager.check()
    return cache.pool.stats().device.used


def zeros(*holes: tuple[int, int]) -> torch.Tensor:
    mask = MASK.clone()
    for row, column in holes:
        mask[row, column] = 0
    return mask


def causal_4d() -> torch.Tensor:
    return torch.zeros(2, 1, 10, 10).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)


@pytest.mark.parametrize(
    ("mask", "more", "message"),
    [
        (zeros((0, 9)), {}, "padding on the left alone"),
        (zeros((1, 4)), {}, "padding on the left alone"),
        (zeros((0, 0), (0, 3)), {}, "padding on the left alone"),
        (MASK[:, :9], {}, "attention_mask must be"),
        (causal_4d(), {}, "2-D attention_mask or none"),
        (torch.zeros_like(MASK), {}, "columns 0 to 9 are padding in every row"),
        (None, {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])}, "run backwards"),
        (MASK, {"position_bias": torch.zeros(1)}, "does not know what position_bias mean"),
        (MASK, {"cu_seq_lens_q": torch.tensor([0, 20])}, "does not know what cu_seq_lens_q mean"),
    ],
)
def test_what_would_change_attention(
    model: PreTrainedModel, cache: PagedCache, mask: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(model, cache, mask=mask, **more)
    assert used(cache) == 0
    assert run(model, cache).isfinite().all()  # the same cache serves whoever asks right


@pytest.mark.parametrize(
    "pattern",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
        lambda row, head, query, key: (key <= query) & (key > query - 5),  # a window that is another than it says
        lambda row, head, query, key: (key <= query) & ((row == 0) | (key > 2)),
        lambda row, head, query, key: (key <= query) | ((key == 300) & (query == 299)),
    ],
)
@pytest.mark.parametrize("window", [None, 4])
def test_other_patterns_than_causal(pattern: Callable[..., torch.Tensor], window: int | None) -> None:
    with pytest.raises(InvalidInput, match="this model masks otherwise"):
        paged_mask(2, 310, 310, 0, pattern, local_size=window)


def test_patterns_that_are_causal() -> None:
    assert paged_mask(2, 300, 310, 10, lambda row, head, query, key: key <= query) == PlainMask((0, 0), None)
    mask = torch.ones(2, 310, dtype=torch.bool)
    mask[1, :300] = False
    pattern = sliding_window_causal_mask_function(8)
    assert paged_mask(2, 300, 310, 10, pattern, mask, local_size=8) == PlainMask((0, 300), 8)
    with pytest.raises(InvalidInput, match="mask function of its own"):
        paged_mask(2, 300, 310, 10, pattern, mask, local_size=8, use_vmap=True)


def test_bidirectional_model() -> None:
    model = copy.deepcopy(tiny_model("Gemma3"))
    model.config.use_bidirectional_attention = True
    model.set_attn_implementation(NAME)
    cache = PagedCache.for_model(model, "torch", num_blocks=9)
    with pytest.raises(InvalidInput, match="mask function of its own"):
        run(model, cache)
    assert used(cache) == 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (zeros((0, 0)), torch.ones(2, 11)),
        (zeros((0, 0)), None),
        (MASK, torch.nn.functional.pad(zeros((1, 0)), (0, 1), value=1)),
    ],
)
def test_padding_that_changes_between_forwards(
    model: PreTrainedModel, cache: PagedCache, first: Any, then: Any
) -> None:
    run(model, cache, mask=first)
    before = used(cache)
    with pytest.raises(InvalidInput, match="every forward needs the padding of the ones before it"):
        run(model, cache, IDS[:, :1], then)
    assert used(cache) == before
    right = torch.nn.functional.pad(first, (0, 1), value=1)
    assert run(model, cache, IDS[:, :1], right).isfinite().all()


def test_another_number_of_rows(model: PreTrainedModel, cache: PagedCache) -> None:
    run(model, cache)
    with pytest.raises(InvalidInput, match="3 rows, the cache holds 2"):
        run(model, cache, torch.ones(3, 1, dtype=torch.long), None)
    cache.reset()
    assert run(model, cache, torch.ones(3, 1, dtype=torch.long), None).shape == (3, 1, VOCABULARY)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cache_without_its_attention(model: PreTrainedModel, cache: PagedCache, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    with pytest.raises(InvalidInput, match="set_attn_implementation"):
        run(model, cache)
    assert used(cache) == 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_attention_without_its_cache(model: PreTrainedModel, use_cache: bool) -> None:
    with pytest.raises(InvalidInput, match="pass one as past_key_values"):
        run(model, DynamicCache() if use_cache else None, use_cache=use_cache)


def test_gradients_and_dropout(model: PreTrainedModel, cache: PagedCache) -> None:
    with pytest.raises(InvalidInput, match="no gradients"):
        model(IDS, past_key_values=cache)
    training = copy.deepcopy(model).train()
    training.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(InvalidInput, match=r"no dropout, got 0\.1"):
        run(training, cache)
    assert used(cache) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Llama4TextConfig(), "chunked_attention"),
        (Qwen3NextConfig(), "linear_attention"),
        (T5Config(), "attend to what others keep"),
        (Gemma3nTextConfig(), "attend to what others keep"),
        (RwkvConfig(), "heads of one size"),
    ],
)
def test_models_whose_layers_keep_something_else(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        model_config(config, torch.float32)


def test_type_that_no_pool_has() -> None:
    with pytest.raises(ConfigError, match=r"float64.*float32"):
        model_config(tiny_model("Llama").config, torch.float64)


def test_windows_by_layer() -> None:
    assert layer_windows(tiny_model("Gemma3").config) == [7, None, 7]
    assert layer_windows(tiny_model("Llama").config) == [None] * LAYERS
    assert layer_windows(MistralConfig(num_hidden_layers=2, sliding_window=5)) == [5, 5]


def test_window_of_the_mask_is_not_that_of_the_config(model: PreTrainedModel, cache: PagedCache) -> None:
    config = copy.deepcopy(model.config)
    config.sliding_window = 6
    with pytest.raises(InvalidInput, match="layer 0 is 6 by the model's config, None by its mask"):
        run(model, PagedCache(config, cache.pool))
    config.num_hidden_layers = 7
    with pytest.raises(InvalidInput, match="7 layers, the pool is made for 3"):
        PagedCache(config, cache.pool)


def test_layers_that_do_not_come_in_order(cache: PagedCache) -> None:
    rows, params = PaddedRows(cache.pool), AttentionParams()

    def attend(layer: int, start: int = 0) -> torch.Tensor:
        query, key = torch.ones(1, 4, 2, 16), torch.ones(1, 2, 2, 16)
        return rows.attention(layer, query, key, key, (start,), params)

    with pytest.raises(InvalidInput, match="layer 1 attends, but it is the turn of layer 0"):
        attend(1)
    attend(0)
    with pytest.raises(InvalidInput, match="layer 2 attends, but it is the turn of layer 1"):
        attend(2)
    with pytest.raises(InvalidInput, match=r"rows start at \[1\] in layer 1, at \[0\] in layer 0"):
        attend(1, start=1)
    attend(1)
    assert rows.length == 0
    assert attend(2).shape == (1, 2, 4, 16)
    assert rows.length == 2


def test_padding_takes_no_slot_and_gives_zero(cache: PagedCache) -> None:
    rows, ones = PaddedRows(cache.pool), torch.ones(2, 2, 5, 16)
    for layer in range(LAYERS):
        out = rows.attention(layer, torch.ones(2, 4, 5, 16), ones, ones, (3, 0), AttentionParams())
        assert out[0, :3].eq(0).all()
        assert torch.allclose(out[0, 3:], torch.ones(2, 4, 16))
        assert torch.allclose(out[1], torch.ones(5, 4, 16))
    assert used(cache) == 1 + 2  # blocks of 4, for 2 tokens and for 5


def test_crop_and_select_out_of_range(model: PreTrainedModel, cache: PagedCache) -> None:
    run(model, cache)
    with pytest.raises(InvalidInput, match="negative number, got 1"):
        cache.crop(1)
    with pytest.raises(InvalidInput, match="11 columns cannot be taken from the 10"):
        cache.crop(-11)
    with pytest.raises(InvalidInput, match="rows must be"):
        cache.batch_select_indices(torch.zeros(0, dtype=torch.long))
    assert cache.get_seq_length() == 10
    cache.crop(-10)
    assert (cache.get_seq_length(), used(cache)) == (0, 0)


def test_too_many_forks_change_nothing(model: PreTrainedModel) -> None:
    cache = PagedCache.for_model(model, "torch", num_blocks=33, block_size=4, max_sequences=5)
    run(model, cache)
    before = cache.pool.stats()
    with pytest.raises(OutOfSequences):
        cache.batch_repeat_interleave(3)
    assert cache.pool.stats().device == before.device
    cache.batch_repeat_interleave(2)
    assert cache.pool.stats().device.sequences == 4


@pytest.mark.parametrize("held", [0, 4, 8])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_model_raises_midway(
    model: PreTrainedModel, cache: PagedCache, layer: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = left_padded([12, 7], seed=2)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    def go_on() -> torch.Tensor:
        return run(model, cache, ids[:, held:], mask, position_ids=positions[:, held:])

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")

    if held:
        run(model, cache, ids[:, :held], mask[:, :held], position_ids=positions[:, :held])
    before = used(cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[layer].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            go_on()
    if layer == LAYERS - 1:  # the last layer had attended: all K and V are there
        assert cache.get_seq_length() == 12
        cache.crop(held - 12)
    assert cache.get_seq_length() == held
    cache.crop(0)  # anything takes back what was begun
    assert used(cache) == before
    ours = go_on()
    model.set_attn_implementation("eager")
    theirs = run(model, None, ids, mask, position_ids=positions, use_cache=False)[:, held:]
    real = mask[:, held:].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-4, rtol=2e-4)
    cache.reset()
    assert used(cache) == 0


def test_backend_raises_midway(
    model: PreTrainedModel, cache: PagedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, cache)
    before, attention, calls = used(cache), TorchBackend.attention, []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("launch failed")
        return attention(*args, **kwargs)

    monkeypatch.setattr(TorchBackend, "attention", failing)
    with pytest.raises(RuntimeError, match="launch failed"):
        run(model, cache, IDS[:, :7], None)
    assert not caplog.messages
    cache.crop(0)
    assert caplog.messages == ["a forward stopped before layer 1: it is taken back"]
    assert (cache.get_seq_length(), used(cache)) == (10, before)


def test_pool_runs_out_while_generating(model: PreTrainedModel) -> None:
    cache = PagedCache.for_model(model, "torch", num_blocks=9, block_size=4)
    with pytest.raises(OutOfBlocks):
        model.generate(IDS, attention_mask=MASK, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert cache.get_seq_length() == 16
    assert used(cache) == 8
    cache.reset()
    assert used(cache) == 0
    with pytest.raises(OutOfBlocks):
        run(model, cache, torch.ones(3, 20, dtype=torch.long), None)
    assert cache.pool.stats().device.sequences == 0
