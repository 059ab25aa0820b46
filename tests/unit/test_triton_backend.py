"""What the Triton backend says of itself where it cannot run, and how shares are counted."""

from __future__ import annotations

import sys

import pytest
import torch

from pagemgr.backends import Capabilities, availability, create
from pagemgr.backends.triton.backend import TritonBackend
from pagemgr.errors import BackendUnavailable
from pagemgr.layout import BlockLayout

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_says_why() -> None:
    (status,) = (status for status in availability() if status.name == "triton")
    assert not status.available
    assert "no CUDA GPU" in status.reason
    with pytest.raises(BackendUnavailable, match="no CUDA GPU"):
        create("triton", LAYOUT, 2, "cpu")


def test_without_triton_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pagemgr.backends.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    (status,) = (status for status in availability() if status.name == "triton")
    assert not status.available
    assert "triton" in status.reason.split("ModuleNotFoundError")[1]


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5, 8.0 is needed" in str(TritonBackend.probe())


def test_it_declares_every_feature_on_gpus() -> None:
    declared = TritonBackend().capabilities()
    assert declared.features == Capabilities(None, frozenset()).features
    assert declared.graph_capture
    assert not declared.missing("cuda", torch.bfloat16, head_dim=80, block_size=16, group_size=7)
    assert declared.missing("cpu", torch.bfloat16, head_dim=80, block_size=16, group_size=7)


@pytest.mark.parametrize(
    ("slots", "kv_heads", "most_tiles", "shares"),
    [(132, 8, 10**6, 128), (132, 1, 10**6, 132), (264, 32, 10**6, 256), (132, 71, 10**6, 132), (132, 8, 5, 5)],
)
def test_shares(slots: int, kv_heads: int, most_tiles: int, shares: int) -> None:
    from pagemgr.backends.triton.decode import count_shares

    assert count_shares(slots, kv_heads, most_tiles) == shares
