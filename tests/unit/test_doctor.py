"""``pagemgr doctor``: what it reports, and that it works where little does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import pagemgr
from pagemgr.backends import registry
from pagemgr.backends.registry import BackendStatus
from pagemgr.cli import checkup, doctor
from pagemgr.cli.main import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def with_backends(monkeypatch: pytest.MonkeyPatch, statuses: Iterable[BackendStatus]) -> None:
    monkeypatch.setattr(registry, "availability", lambda: list(statuses))


def test_it_reports_this_machine() -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    machine = json.loads(done.stdout)["machine"]
    assert machine["pagemgr"] == pagemgr.__version__
    assert machine["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert machine["numpy"] == np.__version__
    assert machine["torch"] == metadata.version("torch")
    assert ("cuda:0" in machine) == torch.cuda.is_available()
    assert machine.keys() >= {"platform", "triton", "g++", "nvcc", "host memory", "cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the library runs on")
def test_a_library_built_for_another_machine_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = tmp_path / "libpagemgr_cuda.so"
    built.write_bytes(b"as pagemgr build cuda leaves it in an image")
    monkeypatch.setattr(checkup, "recipe", lambda _: SimpleNamespace(path=lambda _: built))
    monkeypatch.setattr(checkup, "_open_manager", lambda *_: None)
    monkeypatch.setattr(checkup, "_open_backend", lambda target, *_: f"{target} was opened")
    found = {finding.name: (finding.verdict, finding.found) for finding in checkup.libraries()}
    assert found["library cuda"] == (checkup.GOOD, f"{built}, for a machine with a GPU")
    assert found["library cpu"] == (checkup.BROKEN, "cpu was opened")


def test_the_reference_backend_runs_anywhere() -> None:
    backends = json.loads(run("--json").stdout)["backends"]
    assert {"name": "torch", "available": True, "reason": ""} in backends


def test_tables_are_plain_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiler: apt install g++ [or clang], " + "then say so " * 20 + "and try again"
    with_backends(monkeypatch, [BackendStatus("torch", True, ""), BackendStatus("cpu", False, reason)])
    done = run()
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["cpu", "no"]]
    assert line.strip().endswith(reason)


def test_it_fails_where_no_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backends(monkeypatch, [BackendStatus("mine", False, "my_package does not load: ImportError: no libmine")])
    done = run()
    assert done.exit_code == 1
    assert "no libmine" in done.stdout


def test_a_broken_plugin_is_reported_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("broken", "no_such_package.backend:Mine", "pagemgr.backends")
    monkeypatch.setattr(registry, "entry_points", lambda group: (broken,))
    done = run("--json")
    assert done.exit_code == 0
    backends = {backend["name"]: backend for backend in json.loads(done.stdout)["backends"]}
    assert backends["torch"]["available"] is True
    assert backends["broken"]["available"] is False
    assert "no_such_package" in backends["broken"]["reason"]


def test_a_torch_that_does_not_load_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "pagemgr.backends.registry", None)
    done = run("--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["machine"]["cuda"].startswith("unknown, as torch does not load")
    assert "pip install --force-reinstall torch" in document["backends"][0]["reason"]


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "GPU", 9, 0

    torch_like = ModuleType("torch")
    torch_like.version = type("version", (), {"cuda": "13.0"})  # type: ignore[attr-defined]
    torch_like.cuda = type(  # type: ignore[attr-defined]
        "cuda",
        (),
        {
            "is_available": staticmethod(lambda: True),
            "device_count": staticmethod(lambda: 1),
            "get_device_properties": staticmethod(lambda index: Properties),
            "mem_get_info": staticmethod(lambda index: (3 << 29, 80 << 30)),
        },
    )
    monkeypatch.setitem(sys.modules, "torch", torch_like)
    facts = dict(doctor._cuda())
    assert facts == {"cuda": "13.0", "cuda:0": "GPU, sm_90, 1.5 of 80.0 GiB free"}
