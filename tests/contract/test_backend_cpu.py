"""The CPU library: every instruction set that this machine has passes the conformance suite, on one thread and more."""

from __future__ import annotations


import pytest
import torch

from pagemgr.backends.conformance import ConformanceSuite, checks
from pagemgr.backends.cpu import CpuBackend
from pagemgr.backends.native import NativeBackend
from pagemgr.errors import BackendUnavailable
from pagemgr.native.build import CPU_VARIANTS, build, cpu_recipe


class TestCpu(ConformanceSuite):
    backend: ClassVar = CpuBackend


@pytest.mark.parametrize("best", list(CPU_VARIANTS))
@pytest.mark.parametrize("threads", [1, 3])
def test_every_variant_conforms(best: str, threads: int) -> None:
    """A library without the variants after this one, so that it runs this one; other inputs for each."""
    names = list(CPU_VARIANTS)
    try:
        made_by = cpu_recipe(names[: names.index(best) + 1])
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    backend = NativeBackend.at(build(made_by))()
    if backend.library.variant != best:
        pytest.skip(f"this processor runs {backend.library.variant}, not {best}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for check in checks(backend, "cpu", seed=1 + threads):
            check.run()
    finally:
        torch.set_num_threads(before)
