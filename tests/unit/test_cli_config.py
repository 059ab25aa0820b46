"""The command line's root, its flags made from the config, and ``pagemgr config``."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import pagemgr
from pagemgr.cli import main as root_module
from pagemgr.cli.main import COMMANDS, main
from pagemgr.cli.options import config_options
from pagemgr.config import Config, load
from pagemgr.errors import OutOfBlocks, StaleSequence
from pagemgr.sources import flag, leaves

GIVEN = ["--model.num-layers", "2", "--model.num-kv-heads", "2", "--model.head-dim", "8", "--pool.num-blocks", "8"]


def run(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, arguments, env=environ)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "pagemgr.toml"
    path.write_text("[model]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 8\n[pool]\nnum_blocks = 8\n")
    return path


def test_every_setting_has_a_flag_with_help() -> None:
    shown = run("config", "show", "--help").output
    for key, field in leaves(Config):
        assert f"  {flag(key)} " in shown
        assert field.description
    words = " ".join(shown.split())
    assert (
        "--model.dtype float32|float16|bfloat16 Element type of queries, keys, values and outputs. [default: float32]"
        in words
    )
    assert "--pool.size BYTES Bytes on the device" in words
    assert "--prefix.enabled true|false Match new sequences against cached prefixes. [default: true]" in words


def test_show_says_where_each_value_came_from(toml: Path) -> None:
    arguments = ("config", "show", "--config", str(toml), "--pool.size", "1MiB")
    done = run(*arguments, environ={"PAGEMGR_DEVICE": "cpu"})
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert rows["model.head_dim"] == ["8", str(toml)]
    assert rows["device"] == ["cpu", "PAGEMGR_DEVICE"]
    assert rows["pool.size"] == ["1MiB", "--pool.size"]
    assert rows["pool.num_blocks"] == ["-", "default"]
    assert rows["prefix.enabled"] == ["true", "default"]
    assert "\x1b" not in done.stdout
    assert rows.keys() >= {key for key, _ in leaves(Config)}

    document = json.loads(run(*arguments, "--json", environ={"PAGEMGR_DEVICE": "cpu"}).stdout)
    assert Config.model_validate(document["config"]) == load(toml, {"pool.size": "1MiB", "device": "cpu"}, {}).config
    assert document["origins"]["device"] == "PAGEMGR_DEVICE"


def test_schema_describes_every_setting() -> None:
    schema = json.loads(run("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["PoolConfig"]["properties"]["block_size"]["default"] == 16
    for key, field in leaves(Config):
        section, _, name = key.rpartition(".")
        holder = schema["$defs"][f"{section.title()}Config"] if section else schema
        assert holder["properties"][name]["description"] == field.description


def test_validate_looks_at_the_file_alone(toml: Path) -> None:
    environ = {"PAGEMGR_POOL__NUM_BLOCKS": "no number"}
    done = run("config", "validate", str(toml), environ=environ)
    assert (done.exit_code, done.stdout) == (0, f"{toml}: ok\n")
    toml.write_text(toml.read_text() + "max_seq_len = 4096\n")
    done = run("config", "validate", str(toml), environ=environ)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: pool.max_seq_len = 4096 tokens is more than the pool holds")


def test_problems_are_listed_on_stderr_without_a_traceback() -> None:
    done = run("config", "show", "--device", "gpu")
    assert (done.exit_code, done.stdout) == (2, "")
    first, *others = done.stderr.splitlines()
    assert first == "error: model.num_layers: is required"
    assert others[-1] == "       device = 'gpu' (--device): must be auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (OutOfBlocks(3, 1, 0, "device"), 2, "error: 3 device blocks requested, 1 available"),
        (StaleSequence(4, 5), 2, "error: sequence (row 4, generation 5) was freed"),
        (RuntimeError("a bug"), 1, ""),
        (pagemgr.InternalError("a bug"), 1, ""),
    ],
)
def test_errors_become_messages_and_bugs_keep_their_traceback(
    error: Exception, exit_code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @config_options
    def failing(config: Config) -> None:
        assert config.pool.num_blocks == 8
        raise error

    monkeypatch.setattr(root_module.LazyGroup, "get_command", lambda *_: failing)
    done = run("doctor", *GIVEN)
    assert done.exit_code == exit_code
    assert done.stderr.startswith(message)
    assert (done.exception is error) == (exit_code == 1)


def test_the_list_of_commands_is_complete_and_cheap() -> None:
    shown = run("--help").stdout
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert run("--version").stdout == f"pagemgr, version {pagemgr.__version__}\n"
    done = run("bogus")
    assert done.exit_code == 2
    assert "No such command 'bogus'" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"Usage: main {name} [OPTIONS]")


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("pagemgr")
    before = (logger.level, list(logger.handlers))
    yield logger
    logger.level, logger.handlers = before[0], before[1]


@pytest.mark.parametrize(
    ("flags", "level"), [((), logging.WARNING), (("-v",), logging.INFO), (("-vv",), logging.DEBUG)]
)
def test_verbosity(flags: tuple[str, ...], level: int, logger: logging.Logger) -> None:
    assert run(*flags, "config", "schema").exit_code == 0
    assert logger.getEffectiveLevel() == level


def test_the_module_runs(root: Path) -> None:
    command = [sys.executable, "-m", "pagemgr", "config", "show"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: model.num_layers: is required" in done.stderr
