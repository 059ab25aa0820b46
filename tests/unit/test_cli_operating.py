"""``serve``, ``top``, ``inspect``, ``bench`` and ``doctor``'s findings, as an operator meets them."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import pagemgr
from pagemgr.cli import bench, checkup, demo
from pagemgr.cli.main import COMMANDS, main
from pagemgr.cli.serve import DEMO, REPLAY
from pagemgr.cli.top import view
from pagemgr.config import Config
from pagemgr.dump import take, to_document
from pagemgr.errors import BackendUnavailable, ConfigError
from pagemgr.eviction import registry
from pagemgr.service import Server
from tests.serving import TOKEN, ask, document, make_cache, run, use


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def cache() -> pagemgr.PagedKVCache:
    cache = make_cache(token=TOKEN)
    use(cache)
    return cache


@pytest.fixture(scope="module")
def server(cache: pagemgr.PagedKVCache) -> Iterator[Server]:
    with cache.serve() as server:
        yield server


# Help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["serve", "top", "plan", "doctor", "bench", "inspect"])
def test_help_shows_an_example_and_the_summary_is_listed(name: str) -> None:
    text = invoke(name, "--help").stdout
    assert re.search(rf"^ +.*pagemgr {name}\b", text.partition("Options:")[0].partition("\n")[2], re.MULTILINE)
    assert COMMANDS[name] in " ".join(invoke("--help").stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_tab_completion_is_there(shell: str) -> None:
    done = CliRunner().invoke(main, env={"_PAGEMGR_COMPLETE": f"{shell}_source"}, prog_name="pagemgr")
    assert "_PAGEMGR_COMPLETE" in done.stdout


# top ----------------------------------------------------------------------------------------------------------------


def test_top_shows_the_pool_once(cache: pagemgr.PagedKVCache, server: Server) -> None:
    done = invoke("top", server.url, "--once")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    (device,) = [line for line in done.stdout.splitlines() if line.startswith("device")]
    assert "7.7% of 10.0 KiB, 3 sequences, ok" in device
    # Of 39 usable blocks 2 are full, 1 is open and 3 are cached: 50 cells have 3, 1, 4 of them.
    assert device.split()[1] == "█" * 3 + "▓" + "▒" * 4 + "·" * 42
    assert "largest of 4 sequences" in done.stdout


def test_top_prints_what_the_api_says(server: Server) -> None:
    said = json.loads(invoke("top", f"127.0.0.1:{server.port}", "--once", "--json").stdout)
    assert said["sequences"] == document(server, "sequences")
    assert said["stats"]["counters"] == document(server, "stats")["counters"]


def test_top_has_rates_from_the_second_look_on() -> None:
    cache = make_cache()
    documents = []
    with cache.serve() as server:
        for count in (10, 8):
            sequence = cache.add(range(count))
            run(cache, sequence, list(range(sequence.num_cached_tokens, count)))
            time.sleep(0.5)
            documents.append({name: document(server, name) for name in ("stats", "tiers", "sequences")})
    console = Console(width=120)
    with console.capture() as shown:
        console.print(view("here", documents[1], documents[0]))
    seconds = documents[1]["stats"]["time"] - documents[0]["stats"]["time"]
    (line,) = [line for line in shown.get().splitlines() if line.split()[:1] == ["tokens"]]
    assert line.split() == ["tokens", "11", f"{1 / seconds:,.0f}"]
    assert re.search(r"prefix hits +38\.9% +87\.5%", shown.get())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:1", "no pool answers at http://127.0.0.1:1: .*Start one with pagemgr serve"),
        ("ftp://127.0.0.1", "must be a URL such as http://127.0.0.1:8620"),
        ("http://127.0.0.1:port", "has no valid port"),
        ("http:///ui", "must be a URL"),
    ],
)
def test_top_says_what_to_do_where_nobody_answers(url: str, reason: str) -> None:
    done = invoke("top", url, "--once")
    assert done.exit_code == 2
    assert re.search(reason, done.stderr.replace("\n       ", " ")), done.stderr


def test_top_meets_other_servers(cache: pagemgr.PagedKVCache, server: Server) -> None:
    done = invoke("top", f"http://127.0.0.1:{server.port}/elsewhere", "--once")
    assert (done.exit_code, "stats is answered with status 404" in done.stderr) == (2, True)


# inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_verifies_a_dump_of_a_running_pool(server: Server, tmp_path: Path) -> None:
    _, _, text = ask(server, "/api/v1/dump", "POST", authorization=f"Bearer {TOKEN}")
    (tmp_path / "dump.json.gz").write_bytes(gzip.compress(text.encode()))
    done = invoke("inspect", str(tmp_path / "dump.json.gz"))
    assert done.exit_code == 0, done.output
    assert "no problem found" in done.stdout
    said = json.loads(invoke("inspect", str(tmp_path / "dump.json.gz"), "--json", "--limit", "1").stdout)
    assert said["problems"] == []
    tiers = [tier["bytes"] for tier in document(server, "tiers")["tiers"]]
    found = [{name: tier[name] for name in told} for tier, told in zip(said["tiers"], tiers, strict=True)]
    assert found == tiers
    assert re.search(r"tier .*open_used.*swapped", done.stdout)
    assert len(said["largest"]) == 1


def test_inspect_names_what_is_wrong_and_fails(cache: pagemgr.PagedKVCache, tmp_path: Path) -> None:
    broken = to_document(take(cache.manager))
    broken["tiers"][0]["refs"][20] = 5
    (tmp_path / "dump.json").write_text(json.dumps(broken))
    done = invoke("inspect", str(tmp_path / "dump.json"))
    assert done.exit_code == 1
    assert "device: block 20 counts 5 references, but 0 table entries name it" in done.stderr
    assert "problems: a bug in pagemgr, please report it with this file" in done.stdout
    assert "where the slots are" in done.stdout  # as this dump knows no bytes


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"\x1f\x8bxx", b"[" * 100_000, b"{}"])
def test_inspect_refuses_what_is_no_dump(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dump.json").write_bytes(content)
    done = invoke("inspect", str(tmp_path / "dump.json"))
    assert done.exit_code == 2
    assert "dump" in done.stderr


# doctor -------------------------------------------------------------------------------------------------------------


def findings() -> dict[str, checkup.Finding]:
    return {one.name: one for one in checkup.checkup()}


def test_doctor_looks_at_everything() -> None:
    found = {one["name"]: one for one in json.loads(invoke("doctor", "--json").stdout)["findings"]}
    assert found.keys() >= {
        *("driver", "compiler", "library manager", "library cpu", "library cuda", "policies"),
        *("shared memory", "open files", "locked memory", "extra serve", "extra otel"),
    }
    assert all(one["advice"] for one in found.values() if one["verdict"] != "good")


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(checkup, "GPU_NODES", tmp_path)
    monkeypatch.setattr(checkup, "DRIVER", tmp_path / "version")
    assert "GPUs without a driver" in findings()["driver"].advice
    (tmp_path / "version").write_text("NVRM version: 580.65\nGCC")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert findings()["driver"].verdict == checkup.WORSE
    assert findings()["driver"].found == "NVRM version: 580.65"


def test_a_library_that_does_not_load_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMGR_NATIVE__CACHE_DIR", str(tmp_path))
    assert findings()["library cpu"].found == "not built yet"
    path = checkup.recipe("cpu").path(tmp_path)
    path.write_bytes(b"\x7fELF but no further")
    found = findings()["library cpu"]
    assert (found.verdict, f"delete {path}" in found.advice) == (checkup.BROKEN, True)
    assert invoke("doctor").exit_code == 1


def test_a_broken_policy_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    broken = EntryPoint("broken", "no_such_package:Policy", "pagemgr.eviction")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    found = findings()["policy broken"]
    assert (found.verdict, "no_such_package" in found.found) == (checkup.BROKEN, True)


def test_little_shared_memory_few_files_and_no_compiler_are_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "ENOUGH_SHARED", 1 << 60)
    monkeypatch.setattr(checkup, "ENOUGH_FILES", 1 << 30)
    monkeypatch.setattr(checkup.shutil, "which", lambda *_, **__: None)
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(checkup, "CGROUP_LIMIT", tmp_path / "memory.max")
    found = findings()
    assert "--shm-size" in found["shared memory"].advice
    assert "ulimit -n" in found["open files"].advice
    assert "apt install g++" in found["compiler"].advice
    assert found["container memory"].found == "1.0 GiB"
    assert found["library cpu"].found == "cannot be built here"
    monkeypatch.setattr(checkup, "SHARED_MEMORY", tmp_path / "none")
    assert "mount a tmpfs" in findings()["shared memory"].advice


def test_what_cannot_be_looked_at_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[checkup.Finding]:
        raise BackendUnavailable("cpu", "what now")

    monkeypatch.setattr(checkup, "limits", fails)
    assert "what now" in findings()["fails"].found


# bench --------------------------------------------------------------------------------------------------------------


def test_bench_measures_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SECONDS": 0.01, "SEQUENCES": 8, "PROMPT": 128, "CONTEXT": 32, "BATCH": 2, "SWAPPED": 2, "DIM": 32}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    said = json.loads(invoke("bench", "--device", "cpu", "--json").stdout)
    figures = {figure["what"].strip(): figure for figure in said["figures"]}
    assert {name.partition(":")[0] for name in figures} >= {"torch", "step of 8 sequences", "fork to 4 and free them"}
    assert all(figure["seconds"] > 0 for figure in figures.values())
    swap = next(figure for name, figure in figures.items() if name.startswith("swap"))
    assert swap["bytes"] == 2 * 16 * 32 * 2 * 8 * 32 * 2
    assert swap["share"] == pytest.approx(swap["ceiling_seconds"] / swap["seconds"])
    shown = invoke("bench", "--device", "cpu")
    assert "of the ceiling" in shown.stdout
    assert "next: pagemgr plan" in shown.stdout


# serve --------------------------------------------------------------------------------------------------------------


def test_serve_runs_the_demo_until_it_is_told_to_stop(root: Path) -> None:
    command = [sys.executable, "-m", "pagemgr", "-v", "--log-format", "json", "serve", "--service.port", "0"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = [process.stdout.readline() for _ in range(4)]  # type: ignore[union-attr]
        url = next(line.split()[-1] for line in said if line.split()[0] == "top")
        deadline = time.monotonic() + 30
        steps = 0
        while steps < 3 and time.monotonic() < deadline:
            stats = json.loads(invoke("top", url, "--json").stdout)["stats"]
            steps = stats["counters"]["steps_committed"]
            time.sleep(0.1)
        assert steps >= 3
        assert stats["sequences"] > 0
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert all(json.loads(line)["level"] in ("info", "warning") for line in errors.splitlines())


def test_the_defaults_of_serve_are_those_of_the_demo() -> None:
    served, shown = Config.load(DEMO), demo._config()
    assert (served.model, served.pool, served.device) == (shown.model, shown.pool, shown.device)
    assert Config.load(REPLAY).resolve_num_blocks() == 50_000


def test_serve_refuses_what_the_demo_cannot_run(tmp_path: Path) -> None:
    done = invoke("serve", "--model.num-q-heads", "64")
    assert (done.exit_code, "or give --replay TRACE" in done.stderr) == (2, True)
    (tmp_path / "trace.jsonl").write_text('{"input_length": 999999, "output_length": 1}\n')
    done = invoke("serve", "--replay", str(tmp_path / "trace.jsonl"))
    assert (done.exit_code, "raise pool.max_seq_len" in done.stderr) == (2, True)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("starlette", "uvicorn")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("pagemgr.service.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"the service needs \w+: pip install 'pagemgr\[serve\]'"):
        make_cache().serve()


def test_the_doctor_knows_every_extra(root: Path) -> None:
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(checkup.EXTRAS) == set(declared) - {"dev"}
    for extra, package in checkup.EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in declared[extra])
