"""The README's code runs, its commands exist, its picture is there; so it is for the pages beside the code."""

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


PAGES = ("pagemgr/README.md", "backends/README.md", "native/README.md", "metrics/README.md")


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str, root: Path) -> None:
    text = (root / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all(((root / page).parent / link).is_file() for link in links), links
    assert page != "README.md" or set(PAGES) <= set(links)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "native/README.md"])
def test_the_example_of_a_page_runs(page: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (root / page).read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, page, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_every_module_is_on_its_page(root: Path) -> None:
    table = re.findall(r"^\| (`.*?) \|", (root / "pagemgr/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    entries = {path.stem for path in (root / "pagemgr").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {name for name in entries if not name.startswith("_")} - {"backends", "metrics", "native"} <= named


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str, root: Path) -> None:
    text = re.sub(r"```.*?```", "", (root / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`([\w./]+\.(?:py|h|hpp|c|yaml|json|md))`", text)) - {"./libmine.so"}
    missing = {
        name for name in named if not (root / page).parent.joinpath(name).exists() and not (root / name).exists()
    }
    assert not missing


def test_example_is_short(readme: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 15


def test_tests_that_are_named_exist(root: Path) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (root / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, name in named:
        source = (root / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def {name}\(|class {name}\b|{name}\b.*=)", source, re.MULTILINE), f"{file}::{name}"
