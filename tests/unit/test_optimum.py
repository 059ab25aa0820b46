"""Belady's optimum against every possible choice, and the comparison that it is printed in."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pagemgr.cli.main import main
from pagemgr.eviction import names
from pagemgr.optimum import Visit, optimum, visits
from pagemgr.replay import replay
from pagemgr.traces import Request


def random_requests(rng: np.random.Generator, count: int, longest: int) -> list[Request]:
    """Paths in a binary tree: an id is a path so far, so that it always has the same parent."""
    found = []
    for _ in range(count):
        ids, node = [], 1
        for _ in range(int(rng.integers(1, longest + 1))):
            node = 2 * node + int(rng.integers(2))
            ids.append(node)
        found.append(Request(0.0, 4 * len(ids) + int(rng.integers(0, 4)), int(rng.integers(0, 9)), np.array(ids), 4))
    return found


def exhaustive(trace: list[Visit], usable: int, block_size: int) -> int:
    """Most hit tokens over all ways to evict."""

    @cache
    def best(step: int, held: frozenset[int]) -> int:
        if step == len(trace):
            return 0
        visit, path = trace[step], trace[step].contents.tolist()
        hits = 0
        while hits < visit.matchable and path[hits] in held:
            hits += 1
        mine = frozenset(path[:hits])
        others = held - mine
        excess = max(len(held) + visit.held - hits - usable, 0)
        kept = (others - frozenset(gone) for gone in combinations(sorted(others), excess))
        return hits * block_size + max(best(step + 1, mine | rest | frozenset(path)) for rest in kept)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = visits(random_requests(rng, 7, 3), 4)
    usable = int(rng.integers(4, 8))
    served = [visit for visit in trace if visit.held <= usable]
    tokens = sum(visit.tokens for visit in served)
    assert optimum(trace, usable, 4) * tokens == pytest.approx(exhaustive(served, usable, 4))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", names())
def test_no_policy_is_better(seed: int, policy: str) -> None:
    requests = random_requests(np.random.default_rng(seed), 300, 9)
    for usable in (12, 40, 200):
        ratio = replay(requests, usable, 4, policy).stats.hit_ratio
        best = optimum(visits(requests, 4), usable, 4)
        assert ratio <= best + 1e-12
        if usable == 200:
            assert best > 0.2


def test_of_nothing() -> None:
    assert optimum([], 4, 4) == 0
    assert optimum(visits(random_requests(np.random.default_rng(0), 3, 2), 4), 1, 4) == 0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    requests = random_requests(np.random.default_rng(1), 60, 5)
    rows = [{"input_length": 512 * len(r.ids), "output_length": 3, "hash_ids": r.ids.tolist()} for r in requests]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(trace: Path, *arguments: str) -> object:
    return CliRunner().invoke(main, ["replay", str(trace), "--block-size", "256", *arguments])


def test_all_policies_beside_the_optimum(trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    printed = run(trace, "--policy", "all", "--blocks", "40", "--blocks", "20", "--picture", str(picture))
    assert printed.exit_code == 0, printed.output
    rows = [line.split() for line in printed.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in (*names(), "optimum")] == [*names(), "optimum"]
    assert ["policy", "20", "40"] in rows
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_as_json_has_lru_and_agrees_with_replay(trace: Path) -> None:
    answer = json.loads(run(trace, "--policy", "lfu", "--blocks", "20", "--blocks", "30", "--json").stdout)
    assert answer["blocks"] == [20, 30]
    assert list(answer["hit_ratio"]) == ["lru", "lfu", "optimum"]
    one = json.loads(run(trace, "--policy", "lfu", "--blocks", "30", "--json").stdout)
    assert round(answer["hit_ratio"]["lfu"][1], 4) == one["hit_ratio"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "best", "--blocks", "9"), "'best' is not one of all, lru"),
        (("--policy", "all", "--blocks", "9", "--with-data"), "give one --policy"),
    ],
)
def test_what_cannot_be_compared(trace: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(trace, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
