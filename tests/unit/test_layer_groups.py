"""How the layers of real models fall into groups of equal blocks."""

from __future__ import annotations

import pytest

from pagemgr.config import Config, ModelConfig, PoolConfig
from pagemgr.errors import ConfigError
from pagemgr.layout import group_layers


@pytest.mark.parametrize(
    ("windows", "size", "groups"),
    [
        ([None] * 32, 32, 1),  # Llama: one group, and nothing else to pay
        ([4096] * 32, 32, 1),  # Mistral 7B v0.1
        ([512] * 15 + [None] * 3, 3, 6),  # Gemma 3 270M
        ([128, None] * 12, 12, 2),  # gpt-oss 20B
        ([1024] * 52 + [None] * 10, 5, 13),  # Gemma 3 27B: 65 layers' room for 62
        ([1024] * 29 + [None] * 5, 5, 7),  # Gemma 3 4B: 35 for 34
        ([8, 16, None], 1, 3),
    ],
)
def test_groups_of_real_models(windows: list[int | None], size: int, groups: int) -> None:
    found = group_layers(windows)
    assert (len(found[0].layers), len(found)) == (size, groups)
    assert sorted(layer for group in found for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in found for layer in group.layers)
    assert all(len(group.layers) <= size for group in found)
    unused = sum(size - len(group.layers) for group in found)
    assert 16 * unused <= len(windows)
    if None in windows:
        assert found[0].window is None


def test_a_short_list_of_windows_repeats() -> None:
    pool = PoolConfig(num_blocks=9)
    model = ModelConfig(num_layers=5, num_kv_heads=1, head_dim=8, windows="4, 0")  # type: ignore[arg-type]
    config = Config(model=model, pool=pool)
    assert [(group.window, group.layers) for group in config.layer_groups] == [
        (None, (1,)),
        (None, (3,)),
        (4, (0,)),
        (4, (2,)),
        (4, (4,)),
    ]
    assert config.layout.num_layers == 1


def test_more_windows_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows has 3 entries for num_layers = 2"):
        ModelConfig(num_layers=2, num_kv_heads=1, head_dim=8, windows=(1, 2, 3))
