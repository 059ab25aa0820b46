"""Hit ratios of ``pagemgr replay`` on real traces against an independent simulation of block-level LRU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from pagemgr.replay import replay
from pagemgr.traces import Request, read_trace

DATA = Path(__file__).parents[3] / "shared" / "data"
UNBOUNDED = 500_000

MOONCAKE = {1000: 0.0442, 2000: 0.0543, 5000: 0.1158, 10_000: 0.2101, 20_000: 0.2836, 50_000: 0.3434, UNBOUNDED: 0.3470}
AGENTIC = {
    2600: 0.0601,
    5000: 0.1624,
    10_000: 0.4224,
    20_000: 0.7747,
    50_000: 0.9393,
    100_000: 0.9579,
    UNBOUNDED: 0.9614,
}
"""Usable blocks → hit ratio by tokens."""


@cache
def trace(name: str) -> list[Request]:
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the trace {path.name} is not part of the repository and is not at {path.parent}")
    return read_trace(path)


@pytest.mark.parametrize("blocks", MOONCAKE)
def test_mooncake(blocks: int) -> None:
    result = replay(trace("mooncake_conversation_dev"), blocks, 512)
    assert result.skipped == 0
    assert round(result.stats.hit_ratio, 4) == MOONCAKE[blocks]


@pytest.mark.parametrize("blocks", AGENTIC)
def test_agentic(blocks: int) -> None:
    result = replay(trace("agentic_coding_dev"), blocks, 64)
    assert result.skipped == 0
    assert round(result.stats.hit_ratio, 4) == AGENTIC[blocks]
