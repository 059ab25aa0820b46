"""The README's code runs, its commands exist, and its picture is there; so are the tests that tests/README.md names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pagemgr.cli.main import COMMANDS


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(readme: str, root: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "32 of 40 tokens are cached\n"


def test_make_targets_and_commands_exist(readme: str, root: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", readme, re.MULTILINE)) == {"demo", "test"} <= targets
    named = set(
        re.findall(r"pagemgr ([a-z]+)\b", " ".join(re.findall(r"`([^`\n]*)`|^pagemgr.*$", readme, re.MULTILINE)))
    )
    assert named >= {"replay", "generate", "demo"}
    assert named <= set(COMMANDS)


def test_links_lead_somewhere(readme: str, root: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if "://" not in link]
    assert links
    assert all((root / link).is_file() for link in links), links


def test_example_is_short(readme: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 15


def test_tests_that_are_named_exist(root: Path) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (root / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, name in named:
        source = (root / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def {name}\(|class {name}\b|{name}\b.*=)", source, re.MULTILINE), f"{file}::{name}"
