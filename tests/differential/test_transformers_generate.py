"""``generate`` with a PagedCache against the same with the model's own cache: the same tokens, and no block left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, SHAPES, VOCABULARY, WINDOW, left_padded, tiny_model
from transformers import PreTrainedModel

from pagemgr.backends.registry import BUILT_IN, availability
from pagemgr.integrations.transformers import NAME, PagedCache

RUNNABLE = [status.name for status in availability() if status.available]
LOGITS = {"atol": 2e-4, "rtol": 2e-4}


def paged_cache(
    model: PreTrainedModel, block_size: int = 4, slots: int = 512, backend: str = "torch", **pool: Any
) -> PagedCache:
    """A pool full of NaN: whatever was not written would show."""
    cache = PagedCache.for_model(model, backend, num_blocks=slots // block_size + 1, block_size=block_size, **pool)
    cache.pool.storage.tiers["device"][1:] = 0xFF  # NaN, whatever the type
    return cache


def generate(model: PreTrainedModel, implementation: str, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    model.set_attn_implementation(implementation)
    torch.manual_seed(5)  # for those who sample
    more = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **(more | options))


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for step, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(mine, other, **LOGITS, msg=lambda text, step=step: f"step {step}: {text}")


def assert_empty(cache: PagedCache) -> None:
    cache.reset()
    cache.pool.manager.check()
    device = cache.pool.stats().device
    assert (device.used, device.sequences, device.free) == (0, 0, device.num_blocks - 1)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3"])
def test_greedy_tokens_of_a_ragged_batch(name: str, implementation: str, block_size: int) -> None:
    model, lengths = tiny_model(name), [13, 19, 1]
    ids, mask = left_padded(lengths, seed=block_size)
    cache = paged_cache(model, block_size)
    ours = generate(model, NAME, ids, mask, past_key_values=cache)
    assert_same(ours, generate(model, implementation, ids, mask))
    kept = [length + 19 for length in lengths]  # the last new token was never run
    assert cache.pool.stats().device.used == len(cache.pool.groups) * sum(-(-length // block_size) for length in kept)
    assert_empty(cache)


def test_layers_with_a_window_hold_no_more_than_it() -> None:
    """Gemma 3 over 190 tokens, of which two layers in three see 8: the same tokens, in half the blocks."""
    model = tiny_model("Gemma3")
    ids, mask = left_padded([71, 40], seed=3)
    cache = PagedCache.for_model(model, num_blocks=400, block_size=4, rollback=0)
    ours = generate(model, NAME, ids, mask, past_key_values=cache, max_new_tokens=120)
    assert_same(ours, generate(model, "eager", ids, mask, max_new_tokens=120))
    full = sum(-(-length // 4) for length in (190, 159))
    window = -(-WINDOW // 4)
    assert cache.pool.stats().device.used <= full + 2 * 2 * (window + 1) < 0.5 * 3 * full
    assert_empty(cache)


@pytest.mark.parametrize("backend", [entry.name for entry in BUILT_IN if entry.name in RUNNABLE])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_backend_that_can_run_here(name: str, backend: str) -> None:
    model = tiny_model(name)
    ids, mask = left_padded([21, 10, 2], seed=12)
    cache = paged_cache(model, block_size=16, backend=backend)
    assert_same(generate(model, NAME, ids, mask, past_key_values=cache), generate(model, "eager", ids, mask))
    assert cache.pool.backend.name == backend
    assert_empty(cache)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_softcap_and_sinks(name: str) -> None:
    model = tiny_model(name)
    ids, mask = left_padded([9, 17], seed=1)
    cache = paged_cache(model)
    assert_same(generate(model, NAME, ids, mask, past_key_values=cache), generate(model, "eager", ids, mask))
    assert_empty(cache)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_several_answers_to_each_prompt(name: str) -> None:
    model = tiny_model(name)
    ids, mask = left_padded([12, 5], seed=2)
    cache = paged_cache(model)
    options = {"num_return_sequences": 3, "do_sample": True, "top_k": 20}
    ours = generate(model, NAME, ids, mask, past_key_values=cache, **options)
    assert_same(ours, generate(model, "eager", ids, mask, **options))
    assert len({tuple(row) for row in ours.sequences.tolist()}) == 6
    assert_empty(cache)


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_beam_search_forks_instead_of_copying(name: str, num_beams: int) -> None:
    model = tiny_model(name)
    ids, mask = left_padded([11, 18], seed=3)
    cache = paged_cache(model)
    options = {"num_beams": num_beams, "num_return_sequences": 2, "output_scores": True}
    ours = generate(model, NAME, ids, mask, past_key_values=cache, **options)
    theirs = generate(model, "eager", ids, mask, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **LOGITS)
    stats = cache.pool.stats()
    assert stats.device.saved > 0
    assert 0 < stats.counters.cow_copies < 20 * 2 * num_beams
    assert_empty(cache)


def test_beams_keep_to_their_own_prompt_where_rows_are_tight() -> None:
    """As many rows as there are beams and not one more: forking must give back before it takes."""
    model = tiny_model("Qwen3")
    ids, mask = left_padded([6, 9], seed=4)
    cache = paged_cache(model, max_sequences=8)
    ours = generate(model, NAME, ids, mask, past_key_values=cache, num_beams=4)
    assert ours.sequences.tolist() == generate(model, "eager", ids, mask, num_beams=4).sequences.tolist()
    assert_empty(cache)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_assisted_generation_crops(name: str) -> None:
    model, assistant = tiny_model(name), tiny_model("Qwen3")
    assistant.set_attn_implementation("eager")
    ids, mask = left_padded([14], seed=6)
    theirs = generate(model, "eager", ids, mask)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        cache = paged_cache(model)
        ours = generate(model, NAME, ids, mask, past_key_values=cache, **options)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert cache.get_seq_length() == theirs.sequences.shape[1] - 1
        assert_empty(cache)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_prompt_in_chunks_some_of_them_all_padding(name: str) -> None:
    model = tiny_model(name)
    ids, mask = left_padded([3, 22, 17], seed=7)
    cache = paged_cache(model)
    ours = generate(model, NAME, ids, mask, past_key_values=cache, prefill_chunk_size=5)
    assert_same(ours, generate(model, "eager", ids, mask))
    assert_empty(cache)


def test_conversation_goes_on_in_the_same_cache() -> None:
    model = tiny_model("Gemma3")
    ids, mask = left_padded([8, 12], seed=8)
    more = left_padded([6, 6], seed=9)[0]
    cache = paged_cache(model)
    first = generate(model, NAME, ids, mask, past_key_values=cache).sequences
    ids = torch.cat((first, more), dim=1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    held = cache.get_seq_length()
    ours = generate(model, NAME, ids, mask, past_key_values=cache)
    assert held == first.shape[1] - 1
    assert_same(ours, generate(model, "eager", ids, mask))
    assert_empty(cache)


class Texts:
    """What a cache should hold, as tokens; logits come from running everything anew without any cache."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask

    def take(self, rows: torch.Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def cut(self, columns: int) -> None:
        self.ids, self.mask = (tensor[:, : tensor.shape[1] - columns] for tensor in (self.ids, self.mask))

    def extend(self, ids: torch.Tensor) -> None:
        self.ids, self.mask = torch.cat((self.ids, ids), dim=1), torch.cat((self.mask, torch.ones_like(ids)), dim=1)

    def positions(self, columns: int) -> torch.Tensor:
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -columns:]

    def run(self, cache: PagedCache, columns: int) -> torch.Tensor:
        self.model.set_attn_implementation(NAME)
        new, positions = self.ids[:, -columns:], self.positions(columns)
        with torch.no_grad():
            out = self.model(new, attention_mask=self.mask, position_ids=positions, past_key_values=cache)
        return out.logits

    def logits(self, columns: int) -> torch.Tensor:
        self.model.set_attn_implementation("eager")
        positions = self.positions(self.ids.shape[1])
        with torch.no_grad():
            out = self.model(self.ids, attention_mask=self.mask, position_ids=positions, use_cache=False)
        return out.logits[:, -columns:]


def change(texts: Texts, cache: PagedCache, generator: torch.Generator) -> None:
    """One of the things that ``generate`` does to a cache between two forwards, to both."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = len(texts.ids)
    match number(0, 3):
        case 0:
            removed = number(0, min(6, texts.ids.shape[1] - 1))
            cache.crop(-removed)
            texts.cut(removed)
        case 1:
            order = torch.randint(0, rows, (rows,), generator=generator)
            cache.reorder_cache(order)
            texts.take(order)
        case 2 if rows < 4:
            repeats = number(1, 2)
            cache.batch_repeat_interleave(repeats)
            texts.take(torch.arange(rows).repeat_interleave(repeats))
        case _:
            chosen = torch.randperm(rows, generator=generator)[: number(1, rows)]
            cache.batch_select_indices(chosen)
            texts.take(chosen)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_any_order_of_what_generate_does_to_a_cache(name: str, seed: int) -> None:
    model, generator = tiny_model(name), torch.Generator().manual_seed(100 + seed)
    cache = paged_cache(model, block_size=3, slots=900)
    texts = Texts(model, *left_padded(torch.randint(1, 10, (4,), generator=generator).tolist(), seed))
    columns = texts.ids.shape[1]
    for _ in range(25):
        real = texts.mask[:, -columns:].bool()
        torch.testing.assert_close(texts.run(cache, columns)[real], texts.logits(columns)[real], **LOGITS)
        cache.pool.manager.check()
        for _ in range(2):
            change(texts, cache, generator)
        columns = int(torch.randint(1, 6, (), generator=generator))
        texts.extend(torch.randint(2, VOCABULARY, (len(texts.ids), columns), generator=generator))
    assert_empty(cache)


def test_forked_rows_share_the_prompt() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation(NAME)
    ids, mask = left_padded([16, 14], seed=10)
    cache = paged_cache(model, block_size=4)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.pool.stats().device.used == 4 + 4
    cache.batch_repeat_interleave(5)
    assert cache.pool.stats().device.used == 4 + 4
    assert cache.pool.stats().device.saved == 4 * (4 + 4)
    mask = torch.cat((mask.repeat_interleave(5, dim=0), torch.ones(10, 1, dtype=torch.long)), dim=1)
    with torch.no_grad():
        model(torch.randint(2, VOCABULARY, (10, 1)), attention_mask=mask, past_key_values=cache)
    # Each row of the first prompt starts a block; of the second, all but one copy the block that they write to.
    stats = cache.pool.stats()
    assert stats.device.used == (4 + 5) + (3 + 5)
    assert stats.counters.cow_copies == 4
    assert_empty(cache)


def test_what_the_cache_says_of_itself() -> None:
    model = tiny_model("Gemma3")
    cache = PagedCache.for_model(model, "torch", num_blocks=9, block_size=4, max_seq_len=20)
    assert len(cache) == LAYERS
    assert cache.get_max_length() == 20
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    assert cache.is_croppable
    cache.batch_repeat_interleave(3)  # of nothing: as with every other cache of transformers, no error
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(0)
    cache.reset()
    assert cache.pool.stats().sequences == 0
    assert not cache.is_compileable
