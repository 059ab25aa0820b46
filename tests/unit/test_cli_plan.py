"""``pagemgr plan``: figures by hand, models by their config.json, and advice that fits."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pagemgr.cli.main import main
from pagemgr.cli.shape import Shape, read_shape
from pagemgr.config import Config
from pagemgr.errors import InvalidInput
from pagemgr.layout import DType
from pagemgr.manager import BlockManager

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}
GEMMA = {
    "text_config": {
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "dtype": "bfloat16",
}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def write(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_an_8b_model(tmp_path: Path) -> None:
    done = plan("--model", write(tmp_path, LLAMA_8B), "--memory", "40GiB", "--context", "32768", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["token_bytes"] == 2 * 32 * 8 * 128 * 2 == 128 * 1024
    assert said["num_blocks"] == 40 * 2**30 // said["block_bytes"] == 20480
    assert said["sequences"] == 9  # not 10: one block is reserved
    assert said["swap_seconds"] == pytest.approx(32768 * 128 * 1024 / 25e9)
    assert said["waste_by_block_size"]["1"] == 0
    assert said["waste_by_block_size"]["16"] == pytest.approx(7.5 / 32775.5)
    one_more = said["advice"][-1]
    assert "2.0 MiB more memory, or plan for at most 32,752 tokens each" in one_more


def test_the_settings_that_it_prints_are_valid_and_hold_what_was_planned(tmp_path: Path) -> None:
    done = plan("--model", write(tmp_path, LLAMA_8B), "--memory", "40GiB", "--context", "32768")
    assert done.exit_code == 0, done.output
    settings = tomllib.loads(done.stdout[done.stdout.index("# pagemgr.toml") :])
    config = Config.model_validate(settings)
    assert config.resolve_num_blocks() == 20480
    assert config.resolve_max_seq_len(20480) == 32768
    assert config.resolve_host_blocks() == 2049
    assert config.layout.token_bytes == 128 * 1024


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("--memory 1GiB --context 131072", "no sequence of 131,072 tokens fits.*set pool.max_seq_len to 8176"),
        ("--memory 40GiB --context 200000", "set pool.max_seq_len = 200000"),
        ("--memory 4MiB --context 64 --dtype float32", "not even two blocks fit|bfloat16 or float16"),
        ("--memory 400GiB --context 1024", "set pool.max_sequences = 3199"),
        ("--memory 40GiB --context 1024 --block-size 256", "set pool.block_size = 32: unfilled tails waste 11.1%"),
    ],
)
def test_it_says_which_knob_to_turn(arguments: str, advice: str) -> None:
    done = plan(*["--layers", "32", "--kv-heads", "8", "--head-dim", "128"], *arguments.split())
    assert done.exit_code == 0, done.output
    assert re.search(f"turn: .*({advice})", done.stdout), done.stdout


def test_small_blocks_are_slow_to_swap() -> None:
    done = plan(*["--layers", "2", "--kv-heads", "1", "--head-dim", "64", "--memory", "1GiB", "--context", "4096"])
    assert "set pool.block_size = 128 if you swap: a block is 8.0 KiB" in done.stdout


def test_ranks_share_the_heads(tmp_path: Path) -> None:
    model = write(tmp_path, LLAMA_8B)
    said = json.loads(plan("--model", model, "--memory", "5GiB", "--ranks", "4", "--json").stdout)
    assert said["token_bytes"] == 32 * 1024
    said = json.loads(plan("--model", model, "--memory", "5GiB", "--ranks", "16", "--json").stdout)
    assert said["token_bytes"] == 16 * 1024  # a head is not split: two ranks keep the same one
    refused = plan("--model", model, "--memory", "5GiB", "--ranks", "3")
    assert (refused.exit_code, "8 K/V and 32 query heads do not split over 3" in refused.stderr) == (2, True)


def test_layers_with_windows_get_groups_of_their_own(tmp_path: Path) -> None:
    path = Path(write(tmp_path, GEMMA))
    shape = read_shape(path)
    assert shape == Shape((512, 512, 512, 512, 512, 0) * 4 + (512, 512), 1, 4, 256, DType.bfloat16)
    done = plan("--model", str(path), "--memory", "1GiB", "--context", "32768")
    assert "2 that keep all tokens, 11 that keep the last 512 tokens" in done.stdout
    config = Config.model_validate(tomllib.loads(done.stdout[done.stdout.index("# pagemgr.toml") :]))
    assert [len(group.layers) for group in config.layer_groups] == [len(group.layers) for group in shape.groups]
    said = json.loads(plan("--model", str(path), "--memory", "1GiB", "--context", "32768", "--json").stdout)
    assert said["block_bytes"] == config.layout.block_bytes
    assert said["num_blocks"] == config.resolve_num_blocks()
    # Two groups keep all of 2048 blocks, eleven keep 512 tokens and what a rollback of 64 may need.
    assert said["sequence_bytes"] == (2 * 2048 + 11 * 37) * said["block_bytes"]
    manager = BlockManager(
        2 * 2048 + 11 * 37 + 1,
        16,
        max_seq_len=32768,
        windows=tuple(group.window for group in shape.groups),
        max_sequences=1,
    )
    sequence = manager.add()
    for _ in range(32768 // 16):
        manager.commit(manager.reserve([sequence], [16]))  # it fits, as planned
    assert manager.stats().device.used <= 2 * 2048 + 11 * 37


def test_quantised_models_count_their_scales(tmp_path: Path) -> None:
    model = write(tmp_path, LLAMA_8B)
    done = plan("--model", model, "--memory", "40GiB", "--context", "32768", "--kv-dtype", "int8", "--json")
    assert json.loads(done.stdout)["token_bytes"] == 2 * 32 * 8 * (128 + 4)
    said = plan("--model", model, "--memory", "40GiB", "--context", "32768").stdout
    assert "set model.kv_dtype = float8_e4m3fn if the model bears it: 19 sequences at once instead of 9" in said


def test_latents_layers_without_kv_and_old_names(tmp_path: Path) -> None:
    path = tmp_path
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8
    write(tmp_path, {**LLAMA_8B, "layer_types": kinds})
    assert read_shape(path).windows == (0,) * 8
    write(tmp_path, {**LLAMA_8B, "layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 128})
    assert read_shape(path).windows == (128, 0) * 16
    write(tmp_path, {**LLAMA_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert read_shape(path).token_bytes == 32 * 576 * 2
    done = plan("--model", str(path), "--memory", "10GiB")
    assert "MLA" in done.stdout
    assert "[pool]" not in done.stdout
    write(tmp_path, {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "dtype": "float32"})
    assert read_shape(path) == Shape((0,) * 12, 12, 12, 64, DType.float32, max_context=1024)
    write(tmp_path, {**LLAMA_8B, "sliding_window": 4096, "use_sliding_window": False})
    assert read_shape(path).windows == (0,) * 32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("[]", "must hold an object, got list"),
        ("{}", "it has no num_hidden_layers or n_layer"),
        ('{"n_layer": 1, "n_head": 1, "n_embd": 64, "dtype": "float8_e4m3fn"}', "give --dtype float32, float16"),
        ("[" * 100_000, "cannot read"),
    ],
)
def test_files_that_are_no_models_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match=reason):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--memory 1GiB", "give --model, or --layers, --kv-heads and --head-dim"),
        ("--layers 1 --kv-heads 1 --head-dim 1 --memory 1GiB", "give --context"),
        ("--layers 1 --kv-heads 1 --head-dim 1 --memory lots --context 1", "got 'lots'"),
        ("--layers 1 --kv-heads 1 --head-dim 1 --memory 1GiB --context 1 --link 0", "at least 1 byte a second"),
    ],
)
def test_what_is_missing_is_said(arguments: str, reason: str) -> None:
    done = plan(*arguments.split())
    assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr
