"""The storage moves exactly the blocks it is told to, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import InvalidInput
from pagemgr.layout import BlockLayout, DType, KVDType
from pagemgr.plan import Copies
from pagemgr.storage import Storage

LAYOUT = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=5, dtype=DType.bfloat16)
QUANTISED = replace(LAYOUT, kv_dtype=KVDType.int8)


@pytest.fixture(params=[LAYOUT, QUANTISED], ids=lambda layout: layout.kv_dtype)
def storage(request: pytest.FixtureRequest) -> Storage:
    storage = Storage(request.param, {"device": 12, "host": 9}, torch.device("cpu"), TorchBackend())
    generator = torch.Generator().manual_seed(7)
    for tensor in storage.tiers.values():
        tensor.copy_(torch.randint(256, tensor.shape, generator=generator))
    return storage


def pairs(*values: tuple[int, int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_null_block_is_zero_and_shapes_follow_the_layout() -> None:
    fresh = Storage(LAYOUT, {"device": 4, "host": 3}, torch.device("cpu"), TorchBackend())
    assert {name: tuple(tensor.shape) for name, tensor in fresh.tiers.items()} == {
        "device": (4, 3, 2 * 2 * 5 * 4 * 2),
        "host": (3, 3, 2 * 2 * 5 * 4 * 2),
    }
    assert all(not tensor[0].any() for tensor in fresh.tiers.values())
    assert fresh.tiers["device"].dtype == torch.uint8
    assert fresh.tiers["device"][0].numel() == LAYOUT.block_bytes == 5 * LAYOUT.token_bytes


def test_layers_are_views_of_the_pool() -> None:
    storage = Storage(LAYOUT, {"device": 12}, torch.device("cpu"), TorchBackend())
    pool = storage.tiers["device"].view(torch.bfloat16).view(12, 3, 2, 2, 5, 4)
    for i, layer in enumerate(storage.layers):
        assert layer.key_scale is layer.value_scale is None
        assert layer.key.data_ptr() == pool[0, i, 0].data_ptr()
        assert layer.value.data_ptr() == pool[0, i, 1].data_ptr()
        assert layer.key.stride() == layer.value.stride() == (pool.stride(0), pool.stride(3), pool.stride(4), 1)


def test_a_quantised_layer_goes_on_with_its_scales() -> None:
    storage = Storage(QUANTISED, {"device": 12}, torch.device("cpu"), TorchBackend())
    pool, row = storage.tiers["device"], 2 * 5 * 4
    assert QUANTISED.token_bytes == 3 * 2 * 2 * (4 + 4)
    assert pool.shape == (12, 3, 2 * row + 2 * 2 * 5 * 4)
    for i, layer in enumerate(storage.layers):
        parts = (layer.key, layer.value, layer.key_scale, layer.value_scale)
        starts = [part.data_ptr() - pool[0, i].data_ptr() for part in parts]  # type: ignore[union-attr]
        assert starts == [0, row, 2 * row, 2 * row + 2 * 5 * 4]
        assert layer.key.dtype == torch.int8
        assert layer.key.stride() == layer.value.stride() == (pool.stride(0), 5 * 4, 4, 1)
        assert layer.key_scale is not None
        assert layer.key_scale.dtype == torch.float32
        assert layer.key_scale.shape == (12, 2, 5)
        assert layer.key_scale.stride() == (pool.stride(0) // 4, 5, 1)


def test_an_odd_head_cannot_be_quantised() -> None:
    with pytest.raises(InvalidInput, match="head_dim must be even for kv_dtype int8, got 5"):
        replace(QUANTISED, head_dim=5)


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
        assert torch.equal(tensor, expected[name])


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
