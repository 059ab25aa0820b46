"""A log of calls: what is written, and that the same calls come to the same."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caller import Caller
from logs import edited, lines
from managers import KINDS, Gate, Make, filled, run
from test_manager_atomic import REFUSALS, Scene

from pagemgr.cache import PagedKVCache
from pagemgr.config import Config
from pagemgr.errors import InvalidInput, PagemgrError, StalePin, StaleSequence, StepOrderError
from pagemgr.eviction import names
from pagemgr.fuzz.engine import Engine
from pagemgr.manager import BlockManager
from pagemgr.prefix import Namespace
from pagemgr.recording import RecordingManager, replay_log
from pagemgr.recording.format import READS, VERBS, digest
from pagemgr.sequences import Batch, Sequence


class FencedCaller(Caller):
    """Frees and swaps behind fences that pass late, one of which fails once; names freed sequences; gives bad ids."""

    def __init__(self, manager: BlockManager, seed: int) -> None:
        super().__init__(manager, seed)
        self.gates: list[Gate] = []

    def act(self) -> None:
        for gate in self.gates:
            gate.passed = gate.passed or self.rng.integers(5) == 0
        super().act()
        if self.rng.integers(10) == 0:
            wrong = (
                lambda: self.manager.free([Sequence(0, 10**6)]),
                lambda: self.manager.add([-1]),
                lambda: self.manager.fork(Sequence(99, 0), 0),
            )
            with pytest.raises(PagemgrError):
                wrong[self.rng.integers(len(wrong))]()

    def free(self) -> bool:
        self.gates.append(Gate())
        named = self.here[:2] + self.in_host[:1]
        self.manager.free(named, after=self.gates[-1])
        self.here, self.in_host = self.here[2:], self.in_host[1:]
        return bool(named)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.log"


@pytest.fixture
def recording(log: Path) -> Callable[..., RecordingManager]:
    return partial(RecordingManager, log)


# What is recorded comes again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_run_is_reproduced(recording: Make, log: Path, seed: int, compiled: bool) -> None:
    policy = names()[seed % len(names())]
    manager = recording(40, 3, max_sequences=12, num_host_blocks=20, eviction=policy, compiled=compiled)
    caller = FencedCaller(manager, seed)
    for _ in range(600):
        caller.act()
    found = replay_log(log)
    assert found.difference is None
    assert sum(found.calls.values()) == len(lines(log)) - 1
    assert {"StaleSequence", "InvalidInput", "OutOfSequences"} <= set(found.failures)
    assert any("fences" in line for line in lines(log))
    other = edited(log, lambda changed: changed[0]["manager"].update(compiled=not compiled))
    assert replay_log(other).difference is None


EVERYTHING = (
    {"windows": (None,), "host_cache": "off", "eviction": "lru", "debug": 0, "verify_hits": False},
    {"windows": (None, 5, 5), "host_cache": "inclusive", "eviction": "hit_density", "debug": 1, "verify_hits": True},
    {"windows": (None,), "host_cache": "exclusive", "eviction": "lfu", "debug": 2, "verify_hits": True},
    {"windows": (3, None), "host_cache": "exclusive", "eviction": "s3fifo", "debug": 3, "verify_hits": False},
)


def fuzzed(log: Path, seed: int, sizes: dict[str, Any], calls: int) -> None:
    """Calls of every verb, recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagemgr.fuzz.engine.BlockManager", partial(RecordingManager, log))
        engine = Engine(seed, **sizes)
    for _ in range(calls):
        engine.act()
    engine.end()


@pytest.mark.parametrize("sizes", EVERYTHING, ids=lambda sizes: f"{sizes['windows']}-{sizes['host_cache']}")
def test_layer_groups_host_caches_and_every_verb_are_reproduced(log: Path, sizes: dict[str, Any]) -> None:
    fuzzed(log, 35, sizes, 500)
    found = replay_log(log)
    assert found.difference is None
    assert set(VERBS) - set(found.calls) == {"add_many"}
    made = lines(log)[0]["manager"]
    assert {name: made[name] for name in sizes} == sizes | {"windows": list(sizes["windows"])}
    assert any(line["verb"] == "admit" and line.get("gave", [0, None])[1] for line in lines(log)[1:]) == (
        sizes["host_cache"] != "off"
    )
    changed = edited(log, lambda log_lines: log_lines[0]["manager"].update(host_cache="off", windows=[9]))
    assert replay_log(changed).difference is not None


@pytest.mark.parametrize(
    ("verb", "key"),
    [("admit", "gave"), ("pin", "gave"), ("expire", "gave"), ("clear", "gave"), ("preemption", "gave")],
)
def test_what_came_of_every_verb_is_compared(log: Path, verb: str, key: str) -> None:
    fuzzed(log, 35, EVERYTHING[1], 500)
    at = next(i for i, line in enumerate(lines(log)) if line.get("verb") == verb and line.get(key))
    found = replay_log(edited(log, lambda changed: changed[at].update({key: "other"}))).difference
    assert found is not None
    assert (found.line, found.verb) == (at + 1, verb)


def test_no_secret_is_written_and_none_is_made_up(recording: Make, log: Path) -> None:
    secret = b"sixteen bytes or more"
    manager = recording(16, 4, secret=secret, eviction="lfu")
    for _ in range(3):
        manager.free([filled(manager, [1, 2, 3, 4, 5])])
    assert secret.decode() not in log.read_text()
    assert lines(log)[0]["manager"]["secret"] is True
    with pytest.raises(InvalidInput, match="recorded with a secret"):
        replay_log(log)
    assert replay_log(log, secret).difference is None
    with pytest.raises(InvalidInput, match="from 16 to 64 bytes or none, got 65"):
        replay_log(log, bytes(65))


def test_pins_of_others_and_pins_that_ended_are_told_apart(recording: Make, log: Path) -> None:
    manager, other = recording(9, 2, pin_quota=9), BlockManager(9, 2, pin_quota=9)
    mine, ended = (manager.pin(filled(manager, [1, 2, 3]), "me", until=until) for until in (None, 1.0))
    foreign = other.pin(filled(other, [1, 2, 3]), "me")
    assert foreign.number == mine.number
    assert manager.expire(2.0) == 1
    for pin in (foreign, ended):
        with pytest.raises(StalePin):
            manager.unpin(pin)
    with pytest.raises(AttributeError):
        manager.unpin(None)
    manager.unpin(mine)
    given = [line["given"]["pin"] for line in lines(log) if line.get("verb") == "unpin"]
    assert given == [[1, "me", False], [2, "me", False], "unsayable", [1, "me", True]]
    assert replay_log(log).difference is None


@pytest.mark.parametrize("policy", names())
def test_every_policy_is_reproduced(recording: Make, log: Path, policy: str) -> None:
    manager = recording(8, 2, eviction=policy)
    rng = np.random.default_rng(0)
    for _ in range(150):
        manager.free([filled(manager, rng.integers(0, 2, rng.integers(1, 14)))])
    assert manager.stats().device.evicted_total > 100
    assert replay_log(log).difference is None


@pytest.mark.parametrize(
    ("error", "call"), [pytest.param(*rest, id=name) for name, *rest in REFUSALS if not name.startswith("lengths")]
)
def test_a_refusal_is_what_it_was_and_comes_again(
    recording: Make, log: Path, error: type[PagemgrError], call: Callable[[BlockManager, Scene], Any]
) -> None:
    scene = Scene(recording)
    with pytest.raises(error) as raised:
        call(scene.manager, scene)
    assert raised.type is error
    found = replay_log(log)
    assert found.difference is None
    assert found.failures == {error.__name__: 1}


def test_threads_are_written_in_the_order_of_their_calls(recording: Make, log: Path) -> None:
    manager = recording(200, 2, max_sequences=64, num_host_blocks=60)

    def hammer(seed: int) -> None:
        caller = Caller(manager, seed)
        for _ in range(150):
            caller.act()

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replay_log(log).difference is None


@KINDS
def test_recording_decides_nothing(make: Make, log: Path) -> None:
    plain = make(40, 3, max_sequences=12, num_host_blocks=20)
    recorded = RecordingManager(log, 40, 3, max_sequences=12, num_host_blocks=20)
    for manager in (plain, recorded):
        caller = FencedCaller(manager, 5)
        for _ in range(400):
            caller.act()
    assert plain.stats() == recorded.stats()
    assert digest(recorded) == recorded.stats().digest


# What is written ------------------------------------------------------------------------------------------------------


def test_a_log_by_hand(recording: Make, log: Path) -> None:
    manager = recording(9, 2)
    a = manager.add([5, 6, 7], Namespace(tenant="x", media=(b"\x01",)))
    plan = manager.reserve([a], [3])
    manager.commit(plan, [[5, 6, 7]])
    manager.free([a], after=Gate())
    with pytest.raises(StaleSequence):
        manager.free([a])
    header, *calls = lines(log)
    assert header["pagemgr_log"] == 1
    assert (header["manager"]["num_blocks"], header["manager"]["block_size"]) == (9, 2)
    assert "cache_dir" not in header["manager"]
    space = {"tenant": "x", "adapter": None, "media": [{"hex": "01"}]}
    assert [(call["call"], call["verb"], call["given"]) for call in calls] == [
        (1, "add_many", {"prompts": [[5, 6, 7]], "namespaces": [space]}),
        (2, "reserve", {"sequences": [[0, 0]], "tokens": [3]}),
        (3, "commit", {"plan": 2, "tokens": [[5, 6, 7]]}),
        (4, "free", {"sequences": [[0, 0]], "after": 4}),
        (5, "free", {"sequences": [[0, 0]]}),
    ]
    assert calls[0]["gave"] == [[0, 0, 0]]
    assert (calls[4]["error"], calls[4]["numbers"]) == ("StaleSequence", {"row": 0, "generation": 0})
    assert calls[4]["digest"] == manager.stats().digest


def test_every_verb_and_each_of_its_parameters_has_its_place() -> None:
    public = {name for name, _ in inspect.getmembers(BlockManager, inspect.isfunction) if name[0] != "_"}
    assert public == set(VERBS) | set(READS)
    for verb, kinds in VERBS.items():
        assert list(kinds) == list(inspect.signature(getattr(BlockManager, verb)).parameters)[1:]


@pytest.mark.parametrize(
    "tokens",
    [
        [np.array([1, 2], dtype=np.uint16), torch.tensor([3, 4])],
        [iter([1, 2]), (token for token in (3, 4))],
        np.array([[1, 2], [3, 4]]),
        torch.tensor([[1, 2], [3, 4]]),
        [np.int64(2), [np.int32(3), 4]],
        [range(1, 3), b"\x03\x04"],
    ],
    ids=["arrays", "iterators", "matrix", "tensor", "numbers", "others"],
)
def test_tokens_of_any_kind_are_written(recording: Make, log: Path, tokens: Any) -> None:
    manager = recording(9, 2)
    batch = Batch(manager.add_many([[], np.zeros(0)]))
    assert manager.commit(manager.reserve(batch, tokens)) is None
    assert lines(log)[2]["given"]["tokens"] in ([[1, 2], [3, 4]], [2, [3, 4]])
    assert replay_log(log).difference is None


@pytest.mark.parametrize(
    "call",
    [
        lambda m, a: m.reserve([a], [object()]),
        lambda m, a: m.reserve([a], [np.array(3)]),
        lambda m, a: m.reserve([a], [1j]),
        lambda m, a: m.reserve([a], ["12"]),
        lambda m, a: m.add_many([None]),
        lambda m, a: m.add_many([2]),
        lambda m, a: m.free([a], after=object()),
        lambda m, a: m.truncate([a], [None]),
    ],
)
def test_what_no_verb_takes_is_refused_as_ever(recording: Make, log: Path, call: Any) -> None:
    manager, plain = recording(9, 2), BlockManager(9, 2)
    for one in (manager, plain):
        with pytest.raises(InvalidInput):
            call(one, one.add())
    assert replay_log(log).difference is None
    assert replay_log(log).failures == {"InvalidInput": 1}


def test_ended_and_foreign_plans_are_nobodys(recording: Make, log: Path) -> None:
    manager, other = recording(9, 2, num_host_blocks=9), BlockManager(9, 2)
    a = manager.add()
    ended = run(manager, [a], [1])
    foreign = other.reserve([other.add()], [1])
    moved = manager.swap_out([a])
    manager.finish(moved)
    for plan in (ended, foreign):
        for verb in (manager.commit, manager.abort):
            with pytest.raises(StepOrderError):
                verb(plan)
    for verb in (manager.finish, manager.cancel):
        with pytest.raises(StepOrderError):
            verb(moved)
    assert [line["given"].get("plan", line["given"].get("moved")) for line in lines(log)[-6:]] == [0] * 6
    assert replay_log(log).difference is None


def test_a_cache_records_by_config(log: Path) -> None:
    settings = {
        "model": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8},
        "pool": {"num_blocks": 9, "host_blocks": 9, "block_size": 2},
        "device": "cpu",
        "backend": "torch",
        "debug": {"record": str(log)},
    }
    cache = PagedKVCache(Config(**settings))
    a = cache.add([1, 2, 3])
    with cache.step([a], [[1, 2, 3]]) as step:
        step.commit()
    cache.swap_out([a])
    cache.swap_in([a])
    cache.free([a])
    found = replay_log(log)
    assert found.difference is None
    assert list(found.calls) == ["admit", "reserve", "commit", "swap_out", "finish", "swap_in", "free"]
    assert found.peak_used == 2


# Fences ---------------------------------------------------------------------------------------------------------------


class Counting:
    """Answers no for a while, fails once, and then passes."""

    def __init__(self, answers: Iterator[bool | Exception]) -> None:
        self.answers, self.asked = answers, 0

    def query(self) -> bool:
        self.asked += 1
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_fence_passes_at_the_call_at_which_it_passed(recording: Make, log: Path) -> None:
    manager = recording(9, 2, num_host_blocks=9)
    a, b = filled(manager, [1, 2, 3]), filled(manager, [4])
    manager.finish(manager.swap_out([b]))
    fence = Counting(iter([False, RuntimeError("lost"), False, True]))
    manager.free([a, b], after=fence)  # in both tiers: one answer a call serves both
    manager.stats()
    with pytest.raises(RuntimeError, match="lost"):
        manager.stats()
    assert manager.stats().device.fenced == 2
    assert manager.stats().device.fenced == 0
    manager.stats()
    assert fence.asked == 4
    assert [line.get("fences") for line in lines(log)[-5:]] == [None, {"9": "RuntimeError"}, None, {"9": True}, None]
    found = replay_log(log)
    assert found.difference is None
    assert found.failures == {"RuntimeError": 1}


def test_a_fence_that_calls_the_manager_is_no_call_of_its_own(recording: Make, log: Path) -> None:
    manager = recording(9, 2)

    class Curious:
        def query(self) -> bool:
            return manager.stats().sequences == 1

    a, b = manager.add_many([[], []])
    manager.free([b], after=Curious())
    run(manager, [a], [2])
    assert [line["verb"] for line in lines(log)[1:]] == ["add_many", "free", "reserve", "commit"]
    assert replay_log(log).difference is None
