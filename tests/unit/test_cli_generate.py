"""``pagemgr generate``: the text is the model's own, the bytes add up, and what cannot work is said in one message."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.progress import Progress

from pagemgr.cli.generate import Ticker
from pagemgr.cli.main import main

transformers = pytest.importorskip("transformers", reason="generate needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")

PROMPT = "A prompt that takes more than two blocks of sixteen bytes."
PROMPT_TOKENS = len(PROMPT)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, elements, bytes each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with random weights, and a tokenizer for which every byte is a token."""
    path = tmp_path_factory.mktemp("model")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run("--backend", "torch", *arguments, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_greedy_text_is_that_of_the_models_own_cache(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=30, do_sample=False)
    ours = run_json("--model", folder, "--prompt", PROMPT, "-n", 30)
    assert ours["token_ids"] == [theirs[0, PROMPT_TOKENS:].tolist()]
    assert ours["texts"] == tokenizer.batch_decode(theirs, skip_special_tokens=True)
    assert (ours["prompt_tokens"], ours["backend"], ours["device"]) == (PROMPT_TOKENS, "torch", "cpu")
    assert ours["tokens_per_second"] > 0


@pytest.mark.parametrize(("fork", "block_size"), [(1, 16), (4, 16), (3, 5)])
def test_memory_adds_up(folder: Path, fork: int, block_size: int) -> None:
    memory = run_json("--model", folder, "--prompt", PROMPT, "-n", 9, "--fork", fork, "--block-size", block_size)[
        "memory"
    ]
    block = block_size * TOKEN_BYTES
    shared = (PROMPT_TOKENS - 1) // block_size  # generate runs the last token of the prompt, for each row
    stored = PROMPT_TOKENS + 8  # so it does all new tokens but the last
    blocks = fork * -(-stored // block_size) - (fork - 1) * shared
    assert memory["tokens"] == (fork * stored - (fork - 1) * shared * block_size) * TOKEN_BYTES
    assert memory["tokens"] + memory["tail_waste"] == blocks * block
    assert memory["saved_by_sharing"] == (fork - 1) * shared * block
    assert memory["reserved"] == block
    assert sum(memory[cause] for cause in ("tokens", "tail_waste", "free", "reserved")) == memory["pool"]
    assert memory["contiguous"] == fork * (PROMPT_TOKENS + 9) * TOKEN_BYTES
    assert memory["contiguous_model_limit"] == fork * 128 * TOKEN_BYTES


def test_forks_differ_and_the_seed_repeats_them(folder: Path) -> None:
    first, again, other = (
        run_json("--model", folder, "--prompt", PROMPT, "-n", 12, "--fork", 3, "--seed", seed)["texts"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert len({*first, *other}) == 6
    assert all(text.startswith(PROMPT) for text in first)


def test_prompt_of_one_token(folder: Path) -> None:
    figures = run_json("--model", folder, "--prompt", "x", "-n", 5, "--fork", 2)
    assert [len(row) for row in figures["token_ids"]] == [5, 5]
    assert figures["memory"]["saved_by_sharing"] == 0


def test_text_and_tables_for_people(folder: Path) -> None:
    result = run("--model", folder, "--prompt", PROMPT, "-n", 9, "--fork", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(PROMPT) == 4
    assert result.stderr == ""
    rows = {" ".join(line.split()) for line in result.stdout.splitlines()}
    # 3 whole blocks of the prompt once, 4 rows with 2 blocks of their own; each block is 8 KiB
    assert "pool 0.164 100.0% 21.00" in rows
    assert "free 0.070 42.9% 9.00" in rows
    assert "paged, as it was 0.086 1.0" in rows
    assert "paged, a prompt for each: sharing saved 0.070 MiB 0.156 1.8" in rows
    assert "contiguous, as long as the model allows 0.250 2.9" in rows
    assert "sharing" not in run("--model", folder, "--prompt", PROMPT, "-n", 9).stdout


def test_progress_ends_with_the_last_token() -> None:
    progress = Progress(disable=True)
    ticker = Ticker(progress, 3)
    for _ in range(1 + 3):  # the prompt comes first
        assert not progress.finished
        ticker.put(torch.zeros(2))
    assert progress.finished


def test_transformers_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("--model", folder, "--prompt", PROMPT)
    assert result.exit_code == 2
    assert 'pip install "pagemgr[hf]"' in result.stderr


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    missing = run("--model", "some/hub-name", "--prompt", PROMPT)
    assert (missing.exit_code, "does not exist" in missing.stderr) == (2, True)
    empty = run("--model", tmp_path, "--prompt", PROMPT)
    assert (empty.exit_code, f"cannot load {tmp_path}" in empty.stderr) == (2, True)
    text = tmp_path / "model.gguf"
    text.write_text("not weights")
    wrong = run("--model", text, "--prompt", PROMPT)
    assert (wrong.exit_code, f"cannot load {text}" in wrong.stderr) == (2, True)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    result = run("--model", tmp_path, "--prompt", PROMPT)
    assert (result.exit_code, "safetensors" in result.stderr) == (2, True)


def test_empty_prompt_and_unknown_backend(folder: Path) -> None:
    empty = run("--model", folder, "--prompt", "")
    assert (empty.exit_code, "the prompt has no tokens" in empty.stderr) == (2, True)
    unknown = run("--model", folder, "--prompt", PROMPT, "--backend", "nope")
    assert (unknown.exit_code, "no backend has this name" in unknown.stderr) == (2, True)
