"""Which route blocks take between tiers, how that is measured, and that each route moves the right bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagemgr import routes
from pagemgr.backends.reference import TorchBackend
from pagemgr.layout import BlockLayout
from pagemgr.plan import Copies
from pagemgr.routes import BatchCopy, Cost, Routes, fastest
from pagemgr.storage import Storage

COSTS = {"runs": Cost(0.0, 5e-6, 2e-6), "kernel": Cost(30e-6, 0.0, 2.2e-6)}


def test_the_cost_of_a_route_is_found_from_three_times() -> None:
    cost = Cost(20e-6, 3e-6, 1.5e-6)
    found = Cost.fit(50, cost.of(1, 1), cost.of(50, 50), cost.of(1, 50))
    assert (found.call, found.run, found.block) == pytest.approx((cost.call, cost.run, cost.block))


def test_times_that_contradict_each_other_give_no_negative_cost() -> None:
    assert Cost.fit(10, 5.0, 3.0, 4.0) == Cost(5.0, 0.0, 0.0)


def test_rates_are_told_even_of_times_that_contradict_each_other(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pagemgr"):
        routes._report("in", 1 << 20, {"runs": Cost.fit(10, 5.0, 3.0, 4.0), "batch": Cost(0.0, 1e-4, 0.0)})
    assert caplog.messages == ["512 scattered blocks of 1024 KiB move in: runs 0.1 GB/s, batch 10.5 GB/s"]


@pytest.mark.parametrize(
    ("runs", "blocks", "route"),
    [(1, 1000, "runs"), (45, 1000, "runs"), (50, 1000, "kernel"), (6, 6, "runs"), (7, 7, "kernel")],
)
def test_the_route_depends_on_runs_and_blocks(runs: int, blocks: int, route: str) -> None:
    assert fastest(COSTS, runs, blocks) == route


def test_one_route_where_nothing_is_measured() -> None:
    device, host = torch.zeros(12, 2, 8, dtype=torch.uint8), torch.zeros(9, 2, 8, dtype=torch.uint8)
    only = Routes(device, host, TorchBackend())
    assert set(only.routes) == {"runs"}
    assert fastest(only.costs.get("in", {}), 9, 9) == "runs"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_runs_are_what_lies_side_by_side_on_both_sides(moves: list[tuple[int, int]]) -> None:
    starts = routes._starts(np.array(moves, dtype=np.int32)).tolist()
    expected = [0, *(i for i, (a, b) in enumerate(pairwise(moves), 1) if (b[0] - a[0], b[1] - a[1]) != (1, 1))]
    assert starts == expected


@pytest.mark.parametrize("sizes", [(1000, 700), (30, 9), (9, 4000)])
def test_what_is_measured_is_far_from_the_null_block_and_the_end(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = (torch.zeros(size, 16, dtype=torch.uint8) for size in sizes)
    tried: list[np.ndarray] = []

    def note(route: object, source: torch.Tensor, target: torch.Tensor, pairs: np.ndarray) -> float:
        tried.append(pairs)
        return 1e-6 * len(pairs)

    monkeypatch.setattr(routes, "_seconds", note)
    assert set(routes._measure({"runs": routes.copy_runs}, source, target)) == {"runs"}
    one, scattered, neighbours = tried
    assert (len(one), len(scattered)) == (1, len(neighbours))
    assert len(routes._starts(scattered)) == len(scattered) > 3
    assert len(routes._starts(neighbours)) == 1
    for pairs in tried:
        assert pairs.min() > 0
        assert (pairs < sizes).all()
        assert all(len(set(ids)) == len(ids) for ids in pairs.T.tolist())


def test_tiers_too_small_to_measure_are_moved_by_runs() -> None:
    small = torch.zeros(8, 16, dtype=torch.uint8)
    assert fastest(routes._measure({"runs": routes.copy_runs}, small, torch.zeros(99, 16)), 3, 3) == "runs"


def test_a_route_that_fails_is_told_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(route: object, *rest: object) -> float:
        if route == "broken":
            raise OSError("no such bus")
        return 1.0

    monkeypatch.setattr(routes, "_seconds", seconds)
    tier = torch.zeros(99, 16, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, logger="pagemgr"):
        costs = routes._measure({"kernel": "broken", "runs": "sound"}, tier, tier)  # type: ignore[dict-item]
    assert set(costs) == {"runs"}
    assert "blocks cannot be moved by kernel: no such bus" in caplog.text


def on_gpu(blocks: int = 90) -> Storage:
    layout = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_size=16)
    return Storage(layout, {"device": blocks, "host": 70}, torch.device("cuda"), TorchBackend())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["runs", "batch", "kernel"])
@pytest.mark.parametrize("stream", [torch.cuda.default_stream, torch.cuda.Stream], ids=["default", "own"])
def test_each_route_moves_these_blocks_and_nothing_else(name: str, stream: Callable[[], torch.cuda.Stream]) -> None:
    """In the order of the stream: the source is written just before, the target read just after."""
    storage, draw = on_gpu(), np.random.default_rng(3)
    route = storage._routes.routes[name]
    for source, target in (("device", "host"), ("host", "device"), ("device", "host")):
        ids = [draw.permutation(len(storage.tiers[tier]))[:40] for tier in (source, target)]
        pairs = np.stack(ids, axis=1).astype(np.int32)
        pairs[10:20] = pairs[10] + np.arange(10)[:, None] if (pairs[10] < 60).all() else pairs[10:20]
        pairs = pairs[np.unique(pairs[:, 1], return_index=True)[1]]
        contents = {name: torch.randint(256, tier.shape).to(torch.uint8) for name, tier in storage.tiers.items()}
        staged = contents["device"].cuda()
        storage.tiers["host"].copy_(contents["host"])
        torch.cuda.synchronize()
        with torch.cuda.stream(stream()):
            torch.cuda._sleep(2_000_000)
            storage.tiers["device"].copy_(staged)
            route(storage.tiers[source], storage.tiers[target], pairs)
            staged.copy_(storage.tiers["device"])
        torch.cuda.synchronize()
        contents[target][pairs[:, 1]] = contents[source][pairs[:, 0]]
        assert torch.equal(storage.tiers["host"], contents["host"])
        assert torch.equal(staged.cpu(), contents["device"])


@pytest.mark.gpu
def test_a_gpu_has_measured_routes_and_null_blocks_of_zeros(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pagemgr"):
        storage = on_gpu()
    assert {direction: set(costs) for direction, costs in storage._routes.costs.items()} == {
        "in": {"runs", "batch", "kernel"},
        "out": {"runs", "batch", "kernel"},
    }
    assert caplog.text.count("scattered blocks of 48 KiB move") == 2
    assert not any(tier[0].any() for tier in storage.tiers.values())
    contents = torch.randint(256, storage.tiers["device"].shape).to(torch.uint8)
    storage.tiers["device"].copy_(contents)
    storage.execute([Copies("device", "host", np.array([[3, 8], [4, 9], [7, 1]], dtype=np.int32))], "out")
    torch.cuda.synchronize()
    assert torch.equal(storage.tiers["host"][[8, 9, 1]], contents[[3, 4, 7]])


@pytest.mark.gpu
def test_a_batch_that_fails_says_so() -> None:
    storage = on_gpu()
    pairs = np.array([[1, 2]], dtype=np.int32)
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync of 1 copies failed at 0: CUresult 7"):
        BatchCopy(lambda *arguments: 7)(storage.tiers["device"], storage.tiers["host"], pairs)
