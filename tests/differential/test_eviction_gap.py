"""What hit_density makes of real traces, between LRU and the best that was possible."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from pagemgr.optimum import Visit, optimum, visits
from pagemgr.replay import replay
from pagemgr.traces import Request, read_trace

DATA = Path(__file__).parents[3] / "shared" / "data"
NO_WORSE = 0.002


@cache
def trace(name: str, block_size: int) -> tuple[list[Request], list[Visit]]:
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the trace {path.name} is not part of the repository and is not at {path.parent}")
    requests = read_trace(path)
    return requests, visits(requests, block_size)


@pytest.mark.parametrize(
    ("name", "block_size", "blocks", "closed"),
    [
        ("mooncake_conversation_dev", 512, 2000, 0.15),
        ("mooncake_conversation_dev", 512, 20_000, 0.0),
        ("agentic_coding_dev", 64, 5000, 0.4),
    ],
)
def test_share_of_the_gap(name: str, block_size: int, blocks: int, closed: float) -> None:
    """A sample of the capacities, as each takes half a minute; ``pagemgr replay --policy all`` prints any."""
    requests, trace_ = trace(name, block_size)
    lru, found = (replay(requests, blocks, block_size, policy).stats.hit_ratio for policy in ("lru", "hit_density"))
    best = optimum(trace_, blocks, block_size)
    assert lru - NO_WORSE <= found <= best
    assert found - lru >= closed * (best - lru), (lru, found, best)
