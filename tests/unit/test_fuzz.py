"""``pagemgr fuzz``: it covers what there is, repeats itself, and finds what is broken."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pagemgr import checks, steps, swapping
from pagemgr import manager as manager_module
from pagemgr.cli.main import main
from pagemgr.eviction import LRU, names
from pagemgr.fuzz import engine
from pagemgr.fuzz.driver import Driver
from pagemgr.fuzz.engine import drawn
from pagemgr.fuzz.search import KINDS, Disagreement, Outcome, baseline, fuzz
from pagemgr.manager import BlockManager
from pagemgr.pool import BlockPool
from pagemgr.prefix import Namespace
from pagemgr.second_level import SecondLevel
from pagemgr.sequences import SequenceTable
from pagemgr.steps import leave_windows
from pagemgr.tier import Tier

VERBS = {"add", "fork", "truncate", "free", "prefill", "decode", "reserve", "commit", "abort", "wrong"}
VERBS |= {"swap", "finish", "cancel", "let_pass", "pin", "unpin", "expire", "clear", "preempt"}
REFUSALS = {"InvalidInput", "OutOfBlocks", "OutOfSequences", "SequenceBusy", "SequenceTooLong", "StaleSequence"}
REFUSALS |= {"StepOrderError", "WrongTier", "PinQuotaExceeded", "StalePin"}


def run(seed: int, calls: int, check_every: int = 16, kind: str = "model") -> Outcome:
    return fuzz(kind, seed, range(1, calls + 1), check_every)


def test_it_covers_every_verb_and_every_refusal() -> None:
    outcomes = [run(seed, 500) for seed in range(8)]
    verbs, refused = Counter(), Counter()
    for outcome in outcomes:
        verbs.update(outcome.verbs)
        refused.update(outcome.refused)
        assert sum(outcome.verbs.values()) == outcome.steps == 500
    assert set(verbs) == VERBS
    assert set(refused) == REFUSALS
    assert sum(outcome.evicted for outcome in outcomes) > 200
    assert {outcome.sizes["compiled"] for outcome in outcomes} == {True, False}
    assert any(outcome.sizes["num_host_blocks"] for outcome in outcomes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_manager_comes_up(kind: str) -> None:
    drawn = [KINDS[kind](seed).sizes for seed in range(60)]
    for name, every in {"eviction": set(names()), "debug": {0, 1, 2, 3}, "compiled": {False, True}}.items():
        assert {sizes[name] for sizes in drawn} == every
    if kind == "bytes":
        assert {sizes["host_cache"] for sizes in drawn} == {"off", "inclusive", "exclusive"}
        assert len({sizes["windows"] for sizes in drawn}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_do_equal_things(kind: str) -> None:
    assert run(3, 400, kind=kind) == run(3, 400, check_every=1, kind=kind)
    assert run(3, 400, kind=kind).digest != run(4, 400, kind=kind).digest


# What is broken is found ----------------------------------------------------------------------------------------------


def no_fences(pool: BlockPool, blocks: np.ndarray, times: Any = 1, fences: Any = ()) -> None:
    release(pool, blocks, times)


def no_copies(tier: Any, table: Any, rows: np.ndarray, starts: np.ndarray, size: int) -> Any:
    return rows[:0], tier.pool.stack[:0]


def no_tenants(space: Namespace, block_size: int, secret: bytes) -> bytes:
    return bytes(32)


def newest_first(policy: LRU, count: int) -> np.ndarray:
    everything = victims(policy, len(policy._log))
    return everything[::-1][:count]


def deaf_rows(table: SequenceTable, sequences: Any) -> np.ndarray:
    return np.array([handle.row for handle in getattr(sequences, "sequences", sequences)], dtype=np.int64)


release, victims = BlockPool.release, LRU.victims

FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "fences are ignored": (BlockPool, "release", no_fences),
    "nothing is copied on write": (steps, "_copied_tails", no_copies),
    "namespaces are ignored": (Namespace, "root", no_tenants),
    "the newest are evicted first": (LRU, "victims", newest_first),
    "stale handles are taken": (SequenceTable, "rows", deaf_rows),
    "a cancelled move keeps its blocks": (swapping, "cancel", lambda *_: None),
    "an aborted step keeps its blocks": (steps, "undo_step", lambda *_: None),
    "waste is not counted": (checks, "_waste", lambda *_: 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_repeated(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = FAULTS[fault]
    monkeypatch.setattr(owner, name, broken)
    if name == "undo_step":
        monkeypatch.setattr("pagemgr.manager.undo_step", broken)
    seed = next(seed for seed in range(50) if is_suited(seed))
    with pytest.raises(Disagreement) as first:
        run(seed, 3000)
    again = first.value.step
    with pytest.raises(Disagreement) as second:
        run(seed, again, check_every=1)
    assert second.value.step <= again


def is_suited(seed: int) -> bool:
    """Python's loops, which the faults are in, and a host tier and prefixes."""
    sizes = Driver(seed).limits
    has_all = sizes.num_host_blocks > 0 and sizes.prefix_caching and sizes.block_size > 1
    return has_all and not sizes.compiled and sizes.eviction == "lru"


def test_a_block_that_is_lost_is_found_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(5)
    while not any(row.blocks and row.tier == "device" for row in driver.model.rows):
        driver.act()
    monkeypatch.setattr(driver.pair.manager, "free", lambda *_: None)
    monkeypatch.setattr(driver.pair, "check", lambda: None)
    driver.end()
    with pytest.raises(AssertionError, match=r"\d+ blocks of the device tier are lost"):
        baseline(driver.manager)


def never(*_: Any) -> None:
    pass


IN_BYTES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "nothing leaves its window": (manager_module, "leave_windows", lambda *given: leave_windows(*given[:3], -9, ())),
    "refused drafts stay": (manager_module, "shorten_step", lambda plan, kept, ids, *_: (plan, ids)),
    "what came up is not held": (SecondLevel, "finish", never),
    "what goes down is given to nobody": (SecondLevel, "settle", never),
    "a cancelled promotion keeps its sequences": (SecondLevel, "cancel", never),
    "what is exclusive stays below": (SecondLevel, "give_up", never),
    "events are lost": (Tier, "tell_stored", never),
}


@pytest.mark.parametrize("fault", IN_BYTES)
def test_a_fault_is_found_in_bytes(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*IN_BYTES[fault])
    kinds: dict[str, Any] = {"windows": (None, 5, 5), "host_cache": "exclusive", "compiled": False}
    monkeypatch.setattr(engine, "drawn", lambda rng: drawn(rng) | kinds)
    with pytest.raises(Disagreement) as first:
        deque((run(seed, 400, kind="bytes") for seed in range(20)), maxlen=0)
    with pytest.raises(Disagreement) as second:
        run(first.value.seed, first.value.step, check_every=1, kind="bytes")
    assert second.value.step <= first.value.step


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_repeats_it() -> None:
    done = CliRunner().invoke(main, ["fuzz", "--steps", "80"])
    assert done.exit_code == 0, done.output
    commands = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("pagemgr fuzz")]
    assert [command[1:3] + command[5:7] for command in commands] == [
        ["--kind", kind, "--steps", "40"] for kind in ("model", "bytes")
    ]
    again = [CliRunner().invoke(main, command).stdout for command in commands]
    assert "".join(again).split() == done.stdout.split()
    assert all("every block is free or cached again" in printed for printed in again)


def test_the_command_ends_with_a_line_that_repeats_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockManager, "fork", lambda self, sequence, n=1: [])
    done = CliRunner().invoke(main, ["fuzz", "--seed", "7", "--steps", "2000"])
    assert done.exit_code == 1
    reason, line = done.stderr.strip().splitlines()[-2:]
    assert reason.startswith("model, seed 7, step ")
    assert line.startswith("to repeat it: pagemgr fuzz --kind model --seed 7 --steps ")
    again = CliRunner().invoke(main, line.removeprefix("to repeat it: pagemgr ").split())
    assert again.exit_code == 1


def test_without_assertions_it_does_not_pretend(root: Path) -> None:
    command = [sys.executable, "-O", "-m", "pagemgr", "fuzz", "--steps", "5"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "without -O" in done.stderr
