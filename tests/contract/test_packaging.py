"""What is built holds real files, and works where nothing of the checkout is in reach."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import pagemgr

pytestmark = pytest.mark.xdist_group("packaging")  # one build for all of them

LINKED = ("backends", "metrics", "native")
SHIPPED = {
    ".py",
    ".typed",
    ".h",
    ".hpp",
    ".cpp",
    ".cu",
    ".cuh",
    ".json",
    ".yaml",
    ".css",
    ".html",
    ".js",
    ".LICENSE",
    ".toml",
}
PROBES = ("native/probe.h", "native/probe.hpp", "native/cpu/probe.cpp", "native/cuda/probe.cu", "native/cuda/probe.cuh")
"""Sources added to the copy that is built, so that the patterns are tested for every kind of file and depth."""


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hold, with the links as links."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("pagemgr", *LINKED):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignore)
    for name in PROBES:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("// probe\n")
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """The folder with the sdist, and the wheel that was built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; it borrows the dependencies, but not the editable install of pagemgr."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(
        sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), cwd=home
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "borrowed.pth").write_text("\n".join(borrowed))  # a .pth of a borrowed folder is not read in turn
    return home


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected_files(checkout: Path) -> set[str]:
    """Every file of the package, as it should be named in a wheel."""
    real = {"pagemgr": checkout / "pagemgr"} | {f"pagemgr/{name}": checkout / name for name in LINKED}
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for prefix, folder in real.items()
        for path in folder.rglob("*")
        if path.suffix in SHIPPED and path.is_file()
    }


def test_the_wheel_holds_every_file_of_the_package(checkout: Path, built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
        licence = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    expected = expected_files(checkout)
    assert expected >= {"pagemgr/py.typed", "pagemgr/backends/reference.py", "pagemgr/native/cuda/probe.cu"}
    assert names == expected
    assert not links
    assert licence


def test_the_sdist_holds_real_files(checkout: Path, built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert names >= expected_files(checkout) | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_wheel_works_by_itself(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, pagemgr, pagemgr.backends, pagemgr.cache, pagemgr.metrics;"
        "from importlib.metadata import entry_points;"
        "from pagemgr.backends.registry import BUILT_IN;"
        "print(json.dumps({"
        "'files': [m.__file__ for m in (pagemgr, pagemgr.backends, pagemgr.cache, pagemgr.metrics)],"
        "'registered': [e.name + e.value for e in entry_points(group='pagemgr.backends')],"
        "'built_in': [e.name + e.value for e in BUILT_IN]}))"
    )
    answer = json.loads(run(installed / "bin" / "python", "-I", "-c", code, cwd=tmp_path))
    assert len(answer["files"]) == 4
    assert all(Path(file).is_relative_to(installed) for file in answer["files"]), answer["files"]
    assert sorted(answer["registered"]) == sorted(answer["built_in"])


def test_type_checkers_see_what_is_exported(root: Path) -> None:
    tree = ast.parse((root / "pagemgr" / "__init__.py").read_text(encoding="utf-8"))
    (exported,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert ast.literal_eval(exported) == pagemgr.__all__  # computed names are invisible to mypy --strict
    assert all(hasattr(pagemgr, name) for name in pagemgr.__all__)


def test_the_command_works_by_itself(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "pagemgr"
    assert "pagemgr, version " in run(command, "--version", cwd=tmp_path)
    assert json.loads(run(command, "dashboard", cwd=tmp_path))["title"] == "pagemgr"
    assert run(command, "alerts", cwd=tmp_path).startswith("#")
    names = [backend["name"] for backend in json.loads(run(command, "doctor", "--json", cwd=tmp_path))["backends"]]
    assert "torch" in names
