"""Style that ruff has no rule for. (Docstrings, prints, unused names, line length and format are ruff's.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Rule = Callable[[str, str], Iterator[str]]
"""(dotted name of a module, its source) → what is wrong with it."""

FILE_LINES = 400
FUNCTION_LINES = 60
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
READS_ENVIRONMENT = "pagemgr.config"


def file_is_short(module: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{module} has {lines} lines, at most {FILE_LINES}"


def functions_are_short(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{module}:{node.lineno} {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def name_says_something(module: str, _: str) -> Iterator[str]:
    if vague := VAGUE & set(module.split(".")):
        yield f"{module}: a module called {', '.join(vague)} has no subject"


def nothing_left_for_later(module: str, source: str) -> Iterator[str]:
    yield from _lines_with(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b", module, source)


def no_pickle(module: str, source: str) -> Iterator[str]:
    yield from _lines_with(r"^\s*(import|from) +(c?[pP]ickle|marshal|shelve|dill|joblib)\b", module, source)
    yield from _lines_with(r"\btorch\.(load|save)\(", module, source)


def environment_is_read_in_config(module: str, source: str) -> Iterator[str]:
    if module != READS_ENVIRONMENT:
        yield from _lines_with(r"\bos\.(environ|getenv|putenv)|^from os import.*(environ|getenv)", module, source)


def no_global_statement(module: str, source: str) -> Iterator[str]:
    yield from _lines_with(r"^\s*global +\w", module, source)


EVERYWHERE: tuple[Rule, ...] = (
    file_is_short,
    functions_are_short,
    name_says_something,
    nothing_left_for_later,
    no_pickle,
)
IN_THE_PACKAGE: tuple[Rule, ...] = (environment_is_read_in_config, no_global_statement)


def _lines_with(pattern: str, module: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(pattern, line):
            yield f"{module}:{number} {line.strip()}"


@pytest.mark.parametrize("rule", EVERYWHERE + IN_THE_PACKAGE, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule, package_files: dict[str, Path], root: Path) -> None:
    files = dict(package_files)
    if rule in EVERYWHERE:
        files |= {str(path.relative_to(root).with_suffix("")): path for path in (root / "tests").rglob("*.py")}
    assert READS_ENVIRONMENT in files
    wrong = [line for module, path in files.items() for line in rule(module, path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (file_is_short, "pagemgr.a", "a = 1\n" * (FILE_LINES + 1)),
        (functions_are_short, "pagemgr.a", "def f():\n" + "    a = 1\n" * FUNCTION_LINES),
        (name_says_something, "pagemgr.cli.utils", ""),
        (nothing_left_for_later, "pagemgr.a", "a = 1  # TO" + "DO: more"),
        (no_pickle, "pagemgr.a", "import pickle"),
        (no_pickle, "pagemgr.a", "state = torch." + "load(path)"),
        (environment_is_read_in_config, "pagemgr.a", "os.environ['A']"),
        (environment_is_read_in_config, "pagemgr.a", "from os import environ"),
        (no_global_statement, "pagemgr.a", "def f():\n    global a"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_breach_is_seen(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, source))
