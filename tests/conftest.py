"""What all tests share: when GPU tests run, and where the package's files are."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

with contextlib.suppress(ModuleNotFoundError):  # a GPU machine needs torch and pytest alone
    from hypothesis import settings

    # Machines are shared and slow at times: a deadline would fail tests for what others do.
    settings.register_profile("pagemgr", deadline=None)
    settings.load_profile("pagemgr")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu and only them; needs a CUDA device")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--gpu``, a file without such tests is not even imported: what it needs may be missing there."""
    if config.getoption("--gpu") and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu needs a CUDA device, torch finds none")
        config.hook.pytest_deselected(items=[item for item in items if item not in on_gpu])
        items[:] = on_gpu
    elif not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PAGEMGR_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def package_files() -> dict[str, Path]:
    """Every module of the package, by its dotted name, through the committed links."""
    files = {}
    for folder, _, names in os.walk(ROOT / "pagemgr", followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts).removesuffix(".__init__")] = path
    return files
