"""Layer groups, both host caches, drafts, pins and moves in random order, judged by what is read and nothing else.

``pagemgr fuzz --kind bytes`` draws the sizes; here they are given, so that all there is comes up in each combination.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagemgr.fuzz.engine import Engine
from pagemgr.fuzz.search import baseline

EVERY = ("add", "step", "commit", "drafts", "abort", "fork", "free", "swap", "finish", "cancel", "preempt")
EVERY += ("pin", "unpin", "expire", "clear", "truncate", "let_pass", "run", "copy_now")


def run(windows: tuple[int | None, ...], host_cache: str, compiled: bool) -> Engine:
    groups = len(windows)
    engine = Engine(
        1180 + 10 * groups + len(host_cache),
        num_blocks=1 + 14 * groups,
        block_size=2,
        max_sequences=5,
        max_seq_len=28,
        num_host_blocks=1 + 12 * groups,
        host_cache=host_cache,
        windows=windows,
        rollback=1,
        watermark=0,
        verify_hits=True,
        eviction="lru",
        debug=1,
        compiled=compiled,
    )
    for _ in range(700):
        engine.act()
        engine.check()
        engine.done["dropped"] += int(engine.manager.table.dropped.any())
    return engine


@pytest.mark.parametrize("host_cache", ["off", "inclusive", "exclusive"])
@pytest.mark.parametrize("windows", [(None,), (None, 5, 5), (3,), (None, 7, None, 2)], ids=str)
def test_every_sequence_finds_what_it_wrote(windows: tuple[int | None, ...], host_cache: str) -> None:
    engine, twin = (run(windows, host_cache, compiled) for compiled in (False, True))
    manager, done = engine.manager, engine.done
    assert manager.stats() == twin.manager.stats()
    assert np.array_equal(manager.table.blocks, twin.manager.table.blocks)
    never = {verb for verb in EVERY if not done[verb]}
    assert not never, f"this seed never does {never}"
    assert "OutOfBlocks" in engine.refused
    assert (done["dropped"] > 0) == any(windows)
    engine.end()
    baseline(manager)
    stats = manager.stats()
    assert stats.counters.prefix_hit_tokens > 0
    assert stats.counters.prefix_collisions == stats.counters.invariant_violations == 0
    if host_cache != "off":
        counters = stats.counters
        assert min(counters.demoted_blocks, counters.promoted_blocks, counters.promotion_failures) > 0
    assert manager.clear() == sum(tier.cached for tier in stats.tiers)
    assert all(tier.free + 1 == tier.num_blocks for tier in manager.stats().tiers)
    manager.check()
