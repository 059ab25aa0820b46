"""Logs that are not what they were, logs that cannot be written, and ``pagemgr replay`` of a log."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from logs import edited
from managers import Make, filled, run

from pagemgr.cli.main import main
from pagemgr.errors import ConfigError, InvalidInput, StaleSequence
from pagemgr.recording import RecordingManager, is_log, replay_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.log"


@pytest.fixture
def recording(log: Path) -> Callable[..., RecordingManager]:
    return partial(RecordingManager, log)


# A log that is not what it was ----------------------------------------------------------------------------------------


@pytest.fixture
def small(recording: Make, log: Path) -> Path:
    manager = recording(9, 2)
    a = filled(manager, [1, 2, 3])
    manager.fork(a, 2)
    manager.free([a])
    filled(manager, [1, 2, 4])
    with pytest.raises(StaleSequence):
        manager.fork(a)
    return log


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (1, "gave", [[3, 0, 0]]),
        (2, "gave", "0123456789abcdef"),
        (3, "digest", "00000000"),
        (4, "given", {"sequence": [0, 0], "n": 1}),
        (4, "given", {"sequence": [0, 7], "n": 2}),
        (6, "given", {"prompts": [[9, 9, 9]], "namespaces": [None]}),  # a miss where there was a hit
        (9, "numbers", {"row": 0, "generation": 5}),
        (9, "error", "SequenceBusy"),
    ],
)
def test_what_was_tampered_with_is_noticed_with_its_line(small: Path, line: int, key: str, value: object) -> None:
    assert replay_log(small).difference is None
    found = replay_log(edited(small, lambda changed: changed[line].update({key: value}))).difference
    assert found is not None
    assert (found.line, found.call) == (line + 1, line)
    assert str(found).startswith(f"line {line + 1}, call {line} (")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda changed: changed.pop(3), "line 4: call 4 where call 3 is due"),
        (lambda changed: changed[0].update(pagemgr_log=7), "has format 7, this version reads 1"),
        (lambda changed: changed[0].pop("manager"), "line 1: not the start"),
        (lambda changed: changed[0]["manager"].update(num_blocks=1), "num_blocks=1 must be at least 2"),
        (lambda changed: changed[0]["manager"].update(colour="red"), "line 1: not the start.*colour"),
        (lambda changed: changed[0]["manager"].update(cache_dir="somewhere"), "line 1: no log says from where to load"),
        (lambda changed: changed[2].update(verb="melt"), "line 3: not a call of a log.*melt"),
        (lambda changed: changed[2].update(given={"colour": 1}), "line 3: not a call of a log.*colour"),
        (lambda changed: changed[2].pop("given"), "line 3: not a call of a log.*given"),
        (lambda changed: changed.clear(), "line 1: not the start"),
    ],
)
def test_what_is_no_log_is_named_with_its_line(
    small: Path, edit: Callable[[list[dict[str, Any]]], object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        replay_log(edited(small, edit))


def test_a_last_line_that_is_cut_is_passed_over(small: Path) -> None:
    whole = replay_log(small)
    small.write_bytes(small.read_bytes()[:-9])
    cut = replay_log(small)
    assert (cut.difference, cut.is_cut, whole.is_cut) == (None, True, False)
    assert sum(cut.calls.values()) == sum(whole.calls.values()) - 1


# The file -------------------------------------------------------------------------------------------------------------


def test_a_log_is_its_owners_and_overwrites_nothing(recording: Make, log: Path) -> None:
    recording(9, 2)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    before = log.read_bytes()
    with pytest.raises(ConfigError, match=r"calls\.log.*File exists"):
        recording(9, 2)
    assert log.read_bytes() == before
    with pytest.raises(ConfigError, match="No such file"):
        RecordingManager(log.parent / "none" / "calls.log", 9, 2)
    with pytest.raises(InvalidInput):
        RecordingManager(log.parent / "other.log", 1, 2)
    assert not (log.parent / "other.log").exists()


def test_a_full_disk_ends_the_log_and_nothing_else(
    recording: Make, log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = recording(9, 2)
    a = manager.add()
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - the manager closes it
    monkeypatch.setattr(manager, "_file", full)
    with caplog.at_level(logging.WARNING, "pagemgr"):
        run(manager, [a], [[1, 2, 3]])
        manager.free([a])
    assert [record.getMessage() for record in caplog.records] == [
        "the log of calls ends after call 1: [Errno 28] No space left on device"
    ]
    assert full.closed
    assert replay_log(log).calls == {"add_many": 1}


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_knows_a_log_from_a_trace(small: Path) -> None:
    assert is_log(small)
    done = CliRunner().invoke(main, ["replay", str(small)])
    assert done.exit_code == 0, done.output
    assert "reproduced" in done.stdout.splitlines()
    assert "9: add_many 2, commit 2, fork 2, reserve 2, free 1" in done.stdout
    assert "1: StaleSequence 1" in done.stdout
    assert "3 of 8 blocks" in done.stdout
    printed = json.loads(CliRunner().invoke(main, ["replay", str(small), "--json"]).stdout)
    assert (printed["reproduced"], printed["peak_used"], printed["difference"]) == (True, 3, None)


def test_the_command_shows_the_first_difference(small: Path) -> None:
    other = edited(small, lambda changed: changed[4]["given"].update(n=1))
    done = CliRunner().invoke(main, ["replay", str(other)])
    assert done.exit_code == 1
    assert "first difference: line 5, call 4 (fork): gave: recorded [[1, 0, 0], [2, 0, 0]], replayed [[1, 0, 0]]" in (
        done.stdout
    )
    printed = CliRunner().invoke(main, ["replay", str(other), "--json"])
    assert printed.exit_code == 1
    assert json.loads(printed.stdout)["difference"]["line"] == 5


@pytest.mark.parametrize("option", [["--blocks", "9"], ["--policy", "lru"], ["--with-data"]])
def test_options_of_traces_are_refused_for_a_log(small: Path, option: list[str]) -> None:
    done = CliRunner().invoke(main, ["replay", str(small), *option])
    assert done.exit_code == 2
    assert f"{option[0]} is for traces" in done.stderr


@pytest.mark.parametrize("option", ["--blocks", "--block-size"])
def test_a_trace_needs_its_options(tmp_path: Path, option: str) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"input_length": 4, "output_length": 1}\n')
    given = {"--blocks": "8", "--block-size": "2"}
    arguments = [part for name, value in given.items() if name != option for part in (name, value)]
    done = CliRunner().invoke(main, ["replay", str(trace), *arguments])
    assert done.exit_code == 2
    assert f"Missing option {option}" in done.stderr
