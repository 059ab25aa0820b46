"""What hit_density learns, against loops that say the same, and what it does on traffic made for it."""

from __future__ import annotations

import numpy as np
import pytest

from pagemgr.eviction import returns as module
from pagemgr.eviction.returns import NUM_AGES, Returns
from pagemgr.optimum import Visit, visits
from pagemgr.replay import replay
from pagemgr.traces import Request

AGES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 23, 32, 46, 64])
"""One age of each half octave, but for those that hold no whole number."""


def naive_index(chance: np.ndarray) -> list[float]:
    """By definition: every horizon from every age, starting in its middle."""
    edges = [0.0, *(2 ** (i / 2) for i in range(NUM_AGES))]
    best = []
    for age in range(NUM_AGES):
        here, hits, time, ratios = 1.0, 0.0, 0.0, []
        for later in range(age, NUM_AGES):
            width = (edges[later + 1] - edges[later]) / (2 if later == age else 1)
            hits += here * chance[later]
            time += here * width * (1 - chance[later] / 2)
            here *= 1 - chance[later]
            ratios.append(hits / time)
        best.append(max(ratios))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_the_best_ratio_over_all_horizons(seed: int) -> None:
    rng = np.random.default_rng(seed)
    learned = Returns()
    kinds = [learned.kind(turns, 3, 9.5) for turns in range(3)]
    chances = rng.random((3, NUM_AGES)) * 0.5
    learned._chance.reshape(-1, NUM_AGES)[kinds] = chances
    found = learned._indices(kinds)
    for row, chance in zip(found, chances, strict=True):
        assert np.allclose(row[:40], naive_index(chance)[:40], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_chances_are_hits_over_exposures(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pace and one kind, no doubt: the chance at an age is a fraction that can be counted by hand."""
    monkeypatch.setattr(module, "DOUBT", 1e-12)
    monkeypatch.setattr(module, "DOUBT_FACTOR", 1e-12)
    rng = np.random.default_rng(seed)
    learned = Returns()
    kind = learned.kind(1, 4, 7.0)
    came, stayed, waiting = (AGES[rng.integers(0, len(AGES), count)] for count in (300, 200, 100))
    learned.come_back(np.full(300, kind), came, np.ones(300, int))
    learned.stay(np.full(200, kind), stayed, np.ones(200, int))
    learned.learn(np.full(100, kind), waiting, np.ones(100, int), 1.0)
    still = np.concatenate([stayed, waiting])
    for age in AGES:
        exposed = (came >= age).sum() + (still > age).sum() + 0.5 * (still == age).sum()
        found = learned._chance.reshape(-1, NUM_AGES)[kind, module._bucket(np.array([age]))[0]]
        assert found == pytest.approx(min((came == age).sum() / exposed, 0.9), rel=1e-6)


def test_before_anything_is_learned_old_is_worth_less() -> None:
    density = Returns().density(np.zeros(20, dtype=int), 2 ** np.arange(20))
    assert (np.diff(density) < 0).all()


def test_what_is_old_news_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HORIZON", 100)
    learned = Returns()
    nothing = np.zeros(0, dtype=int)
    kind = np.full(50, learned.kind(0, 1, 0.0))
    for _ in range(40):
        learned.come_back(kind, np.full(50, 8), np.ones(50, int))
        learned.learn(nothing, nothing, nothing, 1.0)
    assert 50 <= learned._came.sum() <= 150


def requests(paths: list[list[int]]) -> list[Request]:
    """Blocks of 16 tokens, one id each."""
    return [Request(0.0, 16 * len(path) + 1, 1, np.array(path), 16) for path in paths]


def hit_ratio(paths: list[list[int]], blocks: int, policy: str) -> float:
    return replay(requests(paths), blocks, 16, policy).stats.hit_ratio


def test_more_sessions_than_fit_keep_some_of_them() -> None:
    """Ten sessions in turn, room for six: LRU keeps each until just before it comes back."""
    rounds = [list(range(1000 * s, 1000 * s + 20)) for _ in range(150) for s in range(10)]
    assert hit_ratio(rounds, 130, "lru") == 0
    assert hit_ratio(rounds, 130, "hit_density") > 0.35


def test_a_flood_of_single_uses_does_not_wash_sessions_away() -> None:
    """One session every 12 requests among requests that never come back."""
    rng = np.random.default_rng(3)
    paths, fresh = [], 10**6
    for step in range(1500):
        if step % 12 == 0:
            first = 5000 + int(rng.integers(4)) * 100
            paths.append(list(range(first, first + 20)))
        else:
            paths.append(list(range(fresh, fresh + 20)))
            fresh += 20
    assert hit_ratio(paths, 300, "hit_density") > 1.5 * hit_ratio(paths, 300, "lru") + 0.02


def test_visits_are_what_replay_serves() -> None:
    found = visits(requests([[1, 2], [1, 2], [1, 3]]), 16)
    assert [visit.contents.tolist() for visit in found] == [[0, 1], [0, 1], [0, 2]]
    assert found[0] == Visit(33, found[0].contents, 2, 3)
