"""The storage moves exactly the blocks it is told to, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagemgr.backends.reference import TorchBackend
from pagemgr.layout import BlockLayout, DType
from pagemgr.plan import Copies
from pagemgr.storage import Storage

LAYOUT = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=5, dtype=DType.bfloat16)


@pytest.fixture
def storage() -> Storage:
    storage = Storage(LAYOUT, {"device": 12, "host": 9}, torch.device("cpu"), TorchBackend())
    generator = torch.Generator().manual_seed(7)
    for tensor in storage.tiers.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return storage


def pairs(*values: tuple[int, int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_null_block_is_zero_and_shapes_follow_the_layout() -> None:
    fresh = Storage(LAYOUT, {"device": 4, "host": 3}, torch.device("cpu"), TorchBackend())
    assert {name: tuple(tensor.shape) for name, tensor in fresh.tiers.items()} == {
        "device": (4, 3, 2, 2, 5, 4),
        "host": (3, 3, 2, 2, 5, 4),
    }
    assert all(not tensor[0].any() for tensor in fresh.tiers.values())
    assert fresh.tiers["device"].dtype == torch.bfloat16
    assert fresh.tiers["device"][0].numel() * 2 == LAYOUT.block_bytes


def test_layers_are_views_of_the_pool(storage: Storage) -> None:
    pool = storage.tiers["device"]
    for i, layer in enumerate(storage.layers):
        assert layer.key.data_ptr() == pool[0, i, 0].data_ptr()
        assert layer.value.data_ptr() == pool[0, i, 1].data_ptr()
        assert layer.key.stride() == layer.value.stride() == (pool.stride(0), pool.stride(3), pool.stride(4), 1)


@pytest.mark.parametrize(
    ("source", "target", "moves"),
    [
        ("device", "device", pairs((1, 2), (1, 3), (7, 11))),
        ("device", "host", pairs((1, 4), (2, 5), (3, 6), (9, 1), (11, 8))),
        ("host", "device", pairs((8, 1), (2, 2), (3, 3), (4, 5))),
    ],
)
def test_execute_moves_these_blocks_and_nothing_else(
    storage: Storage, source: str, target: str, moves: np.ndarray
) -> None:
    before = {name: tensor.clone() for name, tensor in storage.tiers.items()}
    storage.execute([Copies(source, target, moves)])
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for a, b in moves.tolist():
        expected[target][b] = before[source][a]
    for name, tensor in storage.tiers.items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16))


def test_groups_execute_in_order(storage: Storage) -> None:
    wanted = storage.tiers["device"][3].clone()
    storage.execute([Copies("device", "host", pairs((3, 1))), Copies("host", "device", pairs((1, 9)))])
    assert torch.equal(storage.tiers["device"][9], wanted)


def test_side_by_side_blocks_are_one_copy(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    copy = torch.Tensor.copy_

    def counting(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        sizes.append(len(source))
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    storage.execute([Copies("device", "host", pairs((1, 4), (2, 5), (3, 6), (9, 1), (10, 2), (11, 8)))])
    assert sizes == [3, 2, 1]
