"""Many threads, one manager: one lock keeps every call whole."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from caller import Caller
from managers import KINDS, Make

from pagemgr.manager import BlockManager
from pagemgr.stats import Stats

SECONDS = 1.0
THREADS = 8


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Threads take turns within a call, not only between calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def watch(manager: BlockManager, until: float, seen: list[Stats]) -> None:
    while time.monotonic() < until:
        stats = manager.stats()
        manager.check()
        seen.append(stats)


@KINDS
def test_threads_hammer_one_manager(make: Make) -> None:
    manager = make(200, 2, max_sequences=64, num_host_blocks=60)
    callers = [Caller(manager, seed) for seed in range(THREADS)]
    errors: list[BaseException] = []
    seen: list[Stats] = []
    until = time.monotonic() + SECONDS

    def guarded(work: object, *args: object) -> None:
        try:
            work(*args)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    def hammer(caller: Caller) -> None:
        while time.monotonic() < until and not errors:
            caller.act()

    threads = [threading.Thread(target=guarded, args=(hammer, caller)) for caller in callers]
    threads.append(threading.Thread(target=guarded, args=(watch, manager, until, seen)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors, errors
    manager.check()
    flying = sorted((plan.step, plan, late) for caller in callers for plan, _, late in caller.flying)
    for _, plan, late in flying:
        manager.commit(plan, late or None)
    for caller in callers:
        manager.free(caller.here + caller.in_host)
    manager.check()
    stats = manager.stats()
    for tier in stats.tiers:  # no block is lost
        assert (tier.free + tier.cached, tier.used, tier.fenced) == (tier.num_blocks - 1, 0, 0)
    assert (stats.sequences, stats.steps_in_flight, stats.counters.invariant_violations) == (0, 0, 0)
    done = sum((caller.done for caller in callers), start=Counter())
    assert stats.counters.steps_committed == done["commit"] + len(flying)
    assert stats.counters.steps_aborted == done["abort"]
    for moment in seen:
        for tier in moment.tiers:
            states = (tier.null, tier.free, tier.open, tier.full, tier.cached, tier.fenced)
            assert sum(states) == tier.num_blocks
            assert tier.references >= tier.used
    assert len(seen) > 5
    assert min(done[verb] for verb in ("add", "reserve", "commit", "abort", "fork", "free", "swap_out")) > 0


@KINDS
def test_a_fence_may_look_at_the_manager(make: Make) -> None:
    """It is asked under the lock, which its own thread may take again."""
    manager = make(9, 2)

    class Curious:
        def query(self) -> bool:
            return manager.lengths([a]).tolist() == [2]

    a, b = manager.add_many([[], []])
    manager.free([b], after=Curious())
    manager.commit(manager.reserve([a], [2]))
    assert manager.stats().sequences == 1
