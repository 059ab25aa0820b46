"""The demo on a small scale: the whole command, its figures against the manager's own, and that it notices errors."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pagemgr.cache import PagedKVCache
from pagemgr.cli import demo
from pagemgr.cli.main import main
from pagemgr.cli.picture import draw
from pagemgr.cli.toy_engine import Moment, ToyEngine
from pagemgr.cli.toy_model import VOCABULARY, ToyModel
from pagemgr.errors import InvalidInput
from pagemgr.storage import Storage
from pagemgr.workload import SYSTEM_PROMPTS, chat

SMALL = demo.Scale(conversations=9, arrivals=10, num_blocks=66, host_blocks=20, verify_every=10)
"""Meets everything: swaps, a full host, evictions, forks, aborted steps."""
TINY = demo.Scale(conversations=3, arrivals=2, num_blocks=66, host_blocks=8, verify_every=10)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SCALE", TINY)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", *arguments])


@dataclass(frozen=True)
class Finished:
    engine: ToyEngine
    truths: list[tuple[int, int]]
    """After each step, the sequences on the device and their tokens, as the manager's table has them."""


@pytest.fixture(scope="module")
def finished() -> Finished:
    """An engine that ran the small workload to its end, with every invariant checked after every tick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCALE", SMALL)
        cache = PagedKVCache(demo._config())
    engine = ToyEngine(cache, chat(0, SMALL.conversations, VOCABULARY, 1024, SMALL.arrivals), 0, SMALL.verify_every)
    truths: list[tuple[int, int]] = []
    table = cache.manager.table
    while engine.busy:
        engine.tick()
        cache.manager.check()
        if len(engine.moments) > len(truths):
            here = table.live & (table.tier == 0)
            truths.append((int(here.sum()), int(table.computed[here].sum())))
    return Finished(engine, truths)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_tiny")
def test_the_table_the_metrics_and_the_picture(tmp_path: Path) -> None:
    done = run("--picture", str(tmp_path / "a.png"), "--seed", "1")
    assert done.exit_code == 0, done.output
    assert "metrics are live at http://127.0.0.1:" in done.stderr
    for row in ("prefix hit ratio", "saved by sharing", "waste, contiguous", "largest error"):
        assert row in done.stdout
    assert 'pagemgr_up{pool="default"} 1.0' in done.stdout
    assert 'pagemgr_invariant_violations_total{pool="default"} 0.0' in done.stdout
    assert str(tmp_path / "a.png") in done.stdout
    width, height = png_size(tmp_path / "a.png")
    assert (width, height) == (1600, 800)


@pytest.mark.usefixtures("_tiny")
def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    first, again = (run("--json", "--seed", "3", "--picture", str(tmp_path / "b.png")) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["seed"] == 3
    assert first.stdout == again.stdout


@pytest.mark.usefixtures("_tiny")
def test_lost_bytes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "execute", lambda self, copies: None)  # neither copy-on-write nor swaps move anything
    done = run("--picture", str(tmp_path / "d.png"))
    assert done.exit_code == 1
    assert "error: attention is off by" in done.stderr


@pytest.mark.usefixtures("_tiny")
def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("--picture", str(tmp_path / "e.png"))
    assert done.exit_code == 2
    assert "pip install 'pagemgr[demo]'" in done.stderr


@pytest.mark.usefixtures("_tiny")
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    done = run("--picture", str(tmp_path / "nowhere" / "f.png"))
    assert done.exit_code == 2
    assert f"there is no directory {tmp_path / 'nowhere'}" in done.stderr
    assert "metrics are live" not in done.stderr


# The engine ---------------------------------------------------------------------------------------------------------


def test_every_moment_agrees_with_the_manager(finished: Finished) -> None:
    layout = finished.engine.cache.layout
    assert len(finished.engine.moments) == len(finished.truths) > 100
    for moment, (sequences, tokens) in zip(finished.engine.moments, finished.truths, strict=True):
        assert sum(moment.causes.values()) == SMALL.num_blocks * layout.block_bytes
        assert moment.sequences == sequences
        assert moment.contiguous_used == tokens * layout.token_bytes
        assert moment.contiguous_reserved == sequences * 1024 * layout.token_bytes


def test_nothing_is_left_behind(finished: Finished) -> None:
    stats = finished.engine.cache.stats()
    assert (stats.sequences, stats.steps_in_flight) == (0, 0)
    assert [tier.used for tier in stats.tiers] == [0, 0]


def test_the_figures_fit_together_and_nothing_is_idle(finished: Finished) -> None:
    figures = demo._summary(finished.engine)
    token_bytes = finished.engine.cache.layout.token_bytes
    assert figures["contiguous_bytes_peak"] == figures["sequences_peak"] * 1024 * token_bytes
    assert figures["sequences_contiguous"] == SMALL.num_blocks * 16 // 1024
    assert 0 < figures["utilization_mean"] < figures["utilization_peak"] <= 1
    assert 0 < figures["prefix_hit_ratio"] < 1
    assert 0 < figures["waste_paged"] < figures["waste_contiguous"] < 1
    assert 0 < figures["saved_bytes_mean"] < figures["saved_bytes_peak"]
    assert figures["swapped_out"] == figures["swapped_in"] > 0
    for pressure in ("evicted_blocks", "cow_copies", "out_of_blocks", "restarts", "steps_aborted"):
        assert figures[pressure] > 0, pressure
    assert figures["invariant_violations"] == 0


def test_what_is_verified_has_been_through_everything(finished: Finished) -> None:
    verified = finished.engine.verified
    assert {what for _, past in verified for what in past} == {"prefix hit", "fork", "swap", "restart"}
    assert len(verified) >= finished.engine.replies_done // SMALL.verify_every
    assert 0 < max(error for error, _ in verified) < demo.TOLERANCE


def test_the_model_depends_on_every_token_and_its_place() -> None:
    model = ToyModel.random(demo.MODEL, 16, seed=0)
    states = [model.run_dense(tokens) for tokens in ([5, 6, 7, 8], [4, 6, 7, 8], [6, 5, 7, 8])]
    assert (states[0] - states[1]).abs().max() > 1e-2
    assert (states[0] - states[2]).abs().max() > 1e-2


# Workload and picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_workload_keeps_within_its_bounds(seed: int) -> None:
    workload = chat(seed, 50, 100, 600, 30)
    assert workload == chat(seed, 50, 100, 600, 30)
    assert workload != chat(seed + 1, 50, 100, 600, 30)
    for conversation in workload:
        assert conversation.turns
        assert conversation.turns[0].pause < 30
        assert len(conversation.system) in SYSTEM_PROMPTS
        messages = [conversation.system, *(turn.message for turn in conversation.turns)]
        tokens = np.concatenate(messages)
        assert 0 <= tokens.min() <= tokens.max() < 100
        assert len(tokens) + sum(turn.reply_tokens for turn in conversation.turns) <= 600
    assert max(turn.num_replies for conversation in workload for turn in conversation.turns) > 1


def test_a_workload_without_room_for_a_turn_is_refused() -> None:
    with pytest.raises(InvalidInput, match="479"):
        chat(0, 1, 100, 479, 1)
    assert len(chat(0, 100, 100, 480, 1)) == 100


def test_the_picture_shows_fenced_memory_too(tmp_path: Path) -> None:
    names = ("full", "open_used", "tail_waste", "cached", "fenced", "free", "null")
    moments = [Moment(dict.fromkeys(names, i << 20), 0, 1, 1 << 20, 8 << 20) for i in range(1, 30)]
    draw(tmp_path / "with.png", moments, 7 << 20, 1024)
    without = [Moment({**m.causes, "fenced": 0}, 0, 1, 1 << 20, 8 << 20) for m in moments]
    draw(tmp_path / "without.png", without, 7 << 20, 1024)
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
