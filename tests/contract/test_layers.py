"""Arrows point down only: which module may import which, who may change a reference count, who loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# Bottom to top: a unit (a module, or a whole folder) imports only from rows below its own.
LAYERS = (
    ("errors",),
    ("events", "ownership"),
    ("layout", "eviction", "stats", "sources", "ids"),
    ("native",),
    ("watch", "values"),
    ("plan", "pool", "prefix", "config"),
    ("sequences", "tier"),
    ("admission", "preemption", "pins", "swapping", "verb"),
    ("second_level",),
    ("steps",),
    ("checks", "accelerator"),
    ("assembly",),
    ("manager",),
    ("recording", "fuzz"),  # everything up to here loads no torch
    ("batch", "timings", "capture", "dump", "logs"),
    ("backends",),
    ("routes",),
    ("storage",),
    ("cache",),
    ("pagemgr",),  # the names it exports
    ("metrics",),
    ("integrations", "traces", "workload"),
    ("replay", "optimum"),
    ("service",),
    ("cli",),
    ("__main__",),
)

# Narrower than the rows: these load nothing of pagemgr but this. (Types of a row below may be named by anyone.)
ONLY = {
    "pool": {"errors", "layout", "eviction", "watch"},
    "prefix": {"errors", "eviction", "ids"},
    "batch": {"errors", "plan"},
    "native": {"errors"},
    "backends": {"errors", "layout", "batch", "native"},
    "timings": {"stats"},
    "capture": set(),
    "routes": {"backends"},
    "storage": {"errors", "layout", "plan", "pool", "backends", "routes", "timings", "watch"},
    "metrics": {"errors", "stats", "pagemgr"},
}

# The one arrow that points up, inside a function: the hub starts what serves it, and nothing is loaded until it does.
LATE = {("cache", "service")}

LINKED = {"backends", "metrics", "native"}
RANK = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}


def unit_of(module: str) -> str:
    """``pagemgr.cli.main`` is part of ``cli``; ``pagemgr`` itself is a unit."""
    return module.split(".")[1] if "." in module else module


class Import(NamedTuple):
    line: int
    name: str  # absolute
    dots: int  # of a relative import
    for_types: bool  # under TYPE_CHECKING: nothing is loaded
    late: bool  # inside a function: loaded when it is called


def imported(module: str, is_package: bool, tree: ast.AST) -> Iterator[Import]:
    """Every import, those inside functions included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_types = {part for block in blocks for statement in block.body for part in ast.walk(statement)}
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    late = {part for function in functions for part in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, node.module] if node.module else base)]
            if names == ["pagemgr"]:  # what is named is a module, or else something that pagemgr exports
                names = [f"pagemgr.{alias.name}" if alias.name in RANK else "pagemgr" for alias in node.names]
        else:
            continue
        dots = node.level if isinstance(node, ast.ImportFrom) else 0
        yield from (Import(node.lineno, name, dots, node in for_types, node in late) for name in names)


def wrong_arrows(module: str, is_package: bool, source: str) -> list[str]:
    """Every import of the module that the rows, ``ONLY`` or the links forbid, as one sentence each."""
    unit = unit_of(module)
    if unit not in RANK:
        return [f"{module}: give it a place in LAYERS"]
    found = []
    for line, name, dots, for_types, late in imported(module, is_package, ast.parse(source)):
        where, target = f"{module}:{line}", unit_of(name)
        if name.split(".")[0] in LINKED:
            found.append(f"{where} imports {name}, a second copy of pagemgr.{name}")
        elif dots > 1 and unit in LINKED:
            found.append(f"{where} imports across the link, say `from pagemgr`")
        elif name.split(".")[0] != "pagemgr" or target == unit or ((unit, target) in LATE and (late or for_types)):
            continue
        elif target not in RANK or RANK[target] >= RANK[unit]:
            found.append(f"{where} points up to {name}")
        elif target not in ONLY.get(unit, RANK) and not for_types:
            found.append(f"{where} imports {name}, {unit} may only import {', '.join(sorted(ONLY[unit]))}")
    return found


def reference_writes(source: str) -> list[int]:
    """Lines that change an array called ``refs``: by assignment, in place, or through a ufunc."""

    def names_refs(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Attribute) and part.attr == "refs" for part in ast.walk(node))

    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=targets) | ast.Delete(targets=targets):
                changed = any(names_refs(target) for target in targets)
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                changed = names_refs(target)
            case ast.Call(func=ast.Attribute(value=owner, attr=verb), args=args, keywords=keywords):
                in_place = verb in {"at", "copyto", "put", "place", "putmask"} and bool(args) and names_refs(args[0])
                method = verb in {"fill", "put", "sort", "resize", "partition", "itemset"} and names_refs(owner)
                changed = in_place or method or any(word.arg == "out" and names_refs(word.value) for word in keywords)
            case _:
                continue
        if changed:
            lines.append(node.lineno)
    return lines


def test_arrows_point_down(package_files: dict[str, Path]) -> None:
    assert {unit_of(module) for module in package_files} >= {"errors", "manager", "backends", "cli"}
    wrong = [
        line
        for module, path in package_files.items()
        for line in wrong_arrows(module, path.name == "__init__.py", path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_pool_changes_a_reference_count(package_files: dict[str, Path]) -> None:
    assert reference_writes(package_files["pagemgr.pool"].read_text(encoding="utf-8"))
    wrong = [
        f"{module}:{line}"
        for module, path in package_files.items()
        for line in reference_writes(path.read_text(encoding="utf-8"))
        if module != "pagemgr.pool"
    ]
    assert not wrong, wrong


def reads_a_clock(module: str, source: str) -> list[str]:
    """Imports by which time or chance could come into a decision."""
    names = [name.split(".")[0] for _, name, *_ in imported(module, False, ast.parse(source))]
    return sorted({"time", "datetime", "random", "secrets", "uuid"} & set(names))


def test_no_decision_depends_on_a_clock_or_on_chance(package_files: dict[str, Path]) -> None:
    """Clocks jump, and ranks have clocks of their own: the manager decides by its calls alone."""
    core = [module for module in package_files if RANK.get(unit_of(module), 99) <= RANK["manager"]]
    # A build says how long it took, a log line when it was written.
    core = [module for module in core if not module.startswith(("pagemgr.native", "pagemgr.logs"))]
    assert {"pagemgr.manager", "pagemgr.pool", "pagemgr.eviction.recency"} <= set(core)
    found = {module: reads_a_clock(module, package_files[module].read_text(encoding="utf-8")) for module in core}
    assert not any(found.values()), found


def test_a_clock_is_seen() -> None:
    assert reads_a_clock("pagemgr.pool", "def f():\n    from time import monotonic") == ["time"]
    assert reads_a_clock("pagemgr.pool", "import numpy as np") == []


def test_tests_import_the_package_by_its_one_name(root: Path) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sorted((root / "tests").rglob("*.py"))
        for line, name, *_ in imported(path.stem, False, ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in LINKED
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "module",
    [
        *("pagemgr", "pagemgr.manager", "pagemgr.config", "pagemgr.dump", "pagemgr.service"),
        *(f"pagemgr.cli.{name}" for name in ("main", "config", "inspect", "plan", "top")),
    ],
)
def test_loads_no_torch(module: str, root: Path) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("pagemgr.pool", "from .manager import BlockManager", "points up"),
        ("pagemgr.pool", "def f():\n    from . import sequences", "points up"),
        ("pagemgr.pool", "import pagemgr.plan", "points up"),
        ("pagemgr.manager", "from pagemgr import Config", "points up"),
        ("pagemgr.cache", "from pagemgr.metrics import collector", "points up"),
        ("pagemgr.metrics.collector", "from pagemgr.cache import PagedKVCache", "may only import"),
        ("pagemgr.cache", "if TYPE_CHECKING:\n    from pagemgr.metrics import serve", "points up"),
        ("pagemgr.cache", "from .service import serve", "points up"),
        ("pagemgr.manager", "def f():\n    from .service import serve", "points up"),
        ("pagemgr.cache", "def f():\n    from .service import serve", None),
        ("pagemgr.backends.reference", "from pagemgr.pool import BlockPool", "may only import"),
        ("pagemgr.backends.reference", "from ..errors import InvalidInput", "across the link"),
        ("pagemgr.cli.main", "import backends.registry", "second copy"),
        ("pagemgr.extras", "", "give it a place"),
        ("pagemgr.metrics.collector", "if TYPE_CHECKING:\n    from pagemgr.cache import PagedKVCache", None),
        ("pagemgr.cli.main", "import pagemgr, pagemgr.cache\nfrom .options import config_options", None),
        ("pagemgr.backends.registry", "from .interface import Backend\nfrom pagemgr.layout import DType", None),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str, reason: str | None) -> None:
    found = wrong_arrows(module, False, source)
    assert [reason in line for line in found] == [True] if reason else not found


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("pool.refs[blocks] += 1", True),
        ("tier.pool.refs[blocks] = 0", True),
        ("pool.refs = zeros", True),
        ("np.add.at(self.pool.refs, blocks, 1)", True),
        ("np.add(pool.refs, 1, out=pool.refs)", True),
        ("pool.refs.fill(0)", True),
        ("held = pool.refs[blocks] == 1", False),
        ("count = np.add(pool.refs, 1)", False),
    ],
)
def test_a_change_of_a_reference_count_is_seen(line: str, seen: bool) -> None:
    assert bool(reference_writes(line)) == seen
