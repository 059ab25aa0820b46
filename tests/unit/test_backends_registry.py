"""Discovery: built-in, third-party, broken and missing backends; and what ``auto`` takes."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from pagemgr.backends import AttentionParams, Backend, Capabilities, Feature, availability, create, names, registry
from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import BackendUnavailable, InvalidInput, UnsupportedFeature
from pagemgr.layout import BlockLayout, DType, KVDType

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16)
TORCH = EntryPoint("torch", "pagemgr.backends.reference:TorchBackend", registry.GROUP)


class Narrow(TorchBackend):
    """float16 and powers of two only, no ALiBi."""

    name = "narrow"

    def capabilities(self) -> Capabilities:
        return Capabilities(
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float16}),
            head_dims=frozenset({64, 128}),
            group_sizes=frozenset({1, 2, 4}),
            block_sizes=frozenset({16, 32}),
            features=frozenset(Feature) - {Feature.alibi},
        )


class Elsewhere(TorchBackend):
    name = "elsewhere"

    @classmethod
    def probe(cls) -> str | None:
        return "no driver: install one"


class RaisesOnProbe(TorchBackend):
    @classmethod
    def probe(cls) -> str | None:
        raise OSError("libmissing.so")


class RaisesOnConstruction(TorchBackend):
    def __init__(self) -> None:
        raise MemoryError("no room")


class NotABackend:
    @classmethod
    def probe(cls) -> str | None:
        return None


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch):
    """Offer classes of this module as plugins, in place of those that are installed."""
    module = types.ModuleType("plugin_under_test")
    for offered in (Narrow, Elsewhere, RaisesOnProbe, RaisesOnConstruction, NotABackend):
        setattr(module, offered.__name__, offered)
    monkeypatch.setitem(sys.modules, "plugin_under_test", module)

    def install(built_in: bool = False, **targets: str) -> None:
        entries = tuple(EntryPoint(name, target, registry.GROUP) for name, target in targets.items())
        monkeypatch.setattr(registry, "BUILT_IN", (*entries, TORCH) if built_in else (TORCH,))
        monkeypatch.setattr(registry, "entry_points", lambda group: () if built_in else entries)

    return install


def status_of(name: str) -> registry.BackendStatus:
    return next(status for status in availability() if status.name == name)


def test_torch_is_known_without_any_installed_metadata(plugins) -> None:
    plugins()
    assert names() == ["torch"]
    assert status_of("torch") == registry.BackendStatus("torch", available=True, reason="")
    assert isinstance(create("torch", LAYOUT, 4, "cpu"), Backend)


def test_an_entry_point_of_the_same_target_is_no_second_backend(plugins, caplog: pytest.LogCaptureFixture) -> None:
    plugins(torch=TORCH.value)
    assert names() == ["torch"]
    assert not caplog.records


def test_a_plugin_cannot_take_a_built_in_name(plugins, caplog: pytest.LogCaptureFixture) -> None:
    plugins(torch="plugin_under_test:Narrow")
    assert type(create("torch", LAYOUT, 1, "cpu")) is TorchBackend
    assert "plugin_under_test:Narrow is ignored" in caplog.text


def test_a_plugin_is_created_by_name(plugins) -> None:
    plugins(narrow="plugin_under_test:Narrow")
    assert names() == ["torch", "narrow"]
    half = BlockLayout(2, 2, 64, 16, DType.float16)
    assert type(create("narrow", half, 4, "cpu")) is Narrow


def test_an_unknown_name_lists_the_known_ones(plugins) -> None:
    plugins(narrow="plugin_under_test:Narrow")
    with pytest.raises(BackendUnavailable, match=r"'cudda'.*auto, torch, narrow") as error:
        create("cudda", LAYOUT, 1, "cpu")
    assert error.value.backend == "cudda"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Backend", "no_such_module:Backend does not load: ModuleNotFoundError"),
        ("plugin_under_test:Missing", "AttributeError"),
        ("plugin_under_test:RaisesOnProbe", "OSError: libmissing.so"),
        ("plugin_under_test:Elsewhere", "no driver: install one"),
    ],
)
def test_a_broken_plugin_is_reported_and_harms_nobody(plugins, target: str, reason: str) -> None:
    plugins(broken=target)
    assert not status_of("broken").available
    assert reason in status_of("broken").reason
    assert status_of("torch").available
    with pytest.raises(BackendUnavailable, match=reason):
        create("broken", LAYOUT, 1, "cpu")
    assert type(create("auto", LAYOUT, 1, "cpu")) is TorchBackend


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("RaisesOnConstruction", "cannot be constructed: MemoryError: no room"),
        ("NotABackend", "lacks methods of pagemgr.backends.Backend"),
    ],
)
def test_a_plugin_that_is_no_backend_cannot_be_created(plugins, target: str, reason: str) -> None:
    plugins(broken=f"plugin_under_test:{target}")
    with pytest.raises(BackendUnavailable, match=reason):
        create("broken", LAYOUT, 1, "cpu")


def test_create_refuses_what_is_not_declared_with_every_reason(plugins) -> None:
    plugins(narrow="plugin_under_test:Narrow")
    needs = AttentionParams(alibi_slopes=torch.ones(6)).features(with_lse=False)
    with pytest.raises(UnsupportedFeature) as error:
        create("narrow", BlockLayout(2, 2, 96, 24), 3, torch.device("meta"), needs)
    assert error.value.backend == "narrow"
    assert error.value.reasons == (
        "device meta is not one of cpu",
        "dtype torch.float32 is not one of torch.float16",
        "head_dim 96 is not one of 64, 128",
        "block_size 24 is not one of 16, 32",
        "group size 3 is not one of 1, 2, 4",
        "feature alibi is not implemented",
    )


def test_create_refuses_a_group_of_no_heads() -> None:
    with pytest.raises(InvalidInput, match=r"group_size .* got 0"):
        create("torch", LAYOUT, 0, "cpu")


def test_auto_takes_the_first_that_fits_and_says_why_in_one_line(plugins, caplog: pytest.LogCaptureFixture) -> None:
    plugins(built_in=True, elsewhere="plugin_under_test:Elsewhere", narrow="plugin_under_test:Narrow")
    half = BlockLayout(2, 2, 64, 16, DType.float16)
    with caplog.at_level(logging.INFO, logger="pagemgr.backends"):
        assert create("auto", half, 4, "cpu").name == "narrow+torch"
        assert type(create("auto", LAYOUT, 4, "cpu")) is TorchBackend
    assert [record.name for record in caplog.records] == ["pagemgr.backends"] * 2
    narrow, by_dtype = (record.getMessage() for record in caplog.records)
    assert narrow == "backend narrow+torch on cpu (elsewhere cannot run here: no driver: install one)"
    assert "narrow does not fit: dtype torch.float32 is not one of torch.float16" in by_dtype


def test_auto_gives_one_backend_where_it_has_all_features(plugins) -> None:
    plugins(built_in=True, torch_first="pagemgr.backends.reference:TorchBackend", narrow="plugin_under_test:Narrow")
    assert type(create("auto", LAYOUT, 4, "cpu")) is TorchBackend


def test_auto_refuses_a_feature_that_nothing_has(plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(built_in=True, narrow="plugin_under_test:Narrow")
    monkeypatch.setattr(registry, "BUILT_IN", registry.BUILT_IN[:-1])
    half = BlockLayout(2, 2, 64, 16, DType.float16)
    assert type(create("auto", half, 4, "cpu", frozenset({Feature.softcap}))) is Narrow
    with pytest.raises(UnsupportedFeature, match=r"narrow.*feature alibi is not implemented"):
        create("auto", half, 4, "cpu", frozenset({Feature.alibi}))


def test_auto_lets_the_next_one_do_what_the_best_lacks(plugins, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plugins(built_in=True, narrow="plugin_under_test:Narrow")
    made = create("auto", BlockLayout(1, 2, 64, 16, DType.float16), 2, "cpu")
    assert made.name == "narrow+torch"
    assert made.capabilities().features == frozenset(Feature)
    assert made.capabilities().dtypes == Narrow().capabilities().dtypes
    asked = []
    for backend in made._backends:
        backend.attention = lambda *_, name=backend.name: asked.append(name)
    slopes = torch.ones(4)
    plain, with_alibi = AttentionParams(), AttentionParams(alibi_slopes=slopes)
    for params in (plain, with_alibi, with_alibi, plain):
        made.attention(None, None, None, params)
    assert asked == ["narrow", "torch", "torch", "narrow"]
    said = [record.getMessage() for record in caplog.records if "done by" in record.getMessage()]
    assert said == ["attention with alibi is done by torch, as narrow has it not"]


def test_auto_takes_triton_first_for_quantised_keys_and_values(plugins) -> None:
    plugins(built_in=True, cuda="pagemgr.backends.reference:TorchBackend", triton="plugin_under_test:Elsewhere")
    plain = BlockLayout(1, 2, 64, 16, DType.bfloat16)
    quantised = replace(plain, kv_dtype=KVDType.float8_e4m3fn)
    assert [entry.name for entry in registry._best_first(plain)] == ["cuda", "triton", "torch"]
    assert [entry.name for entry in registry._best_first(quantised)] == ["triton", "cuda", "torch"]
    assert type(create("auto", quantised, 2, "cpu")) is TorchBackend


def test_auto_never_takes_a_third_partys_backend(plugins) -> None:
    plugins(narrow="plugin_under_test:Narrow")
    assert type(create("auto", BlockLayout(2, 2, 64, 16, DType.float16), 4, "cpu")) is TorchBackend


def test_auto_gives_every_reason_when_nothing_fits(plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins(built_in=True, elsewhere="plugin_under_test:Elsewhere", narrow="plugin_under_test:Narrow")
    monkeypatch.setattr(registry, "BUILT_IN", registry.BUILT_IN[:-1])
    with pytest.raises(BackendUnavailable, match=r"'auto'.*elsewhere cannot run here.*narrow does not fit"):
        create("auto", LAYOUT, 4, "cpu")


def test_the_package_imports_neither_pytest_nor_a_backend() -> None:
    code = "import sys, pagemgr.backends; print({'pytest', 'pagemgr.backends.reference'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
