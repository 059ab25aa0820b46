"""native/cuda compiles for every architecture that is shipped, without spills, and its library loads without a GPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pagemgr.backends.cuda import CudaBackend
from pagemgr.backends.library import NativeLibrary
from pagemgr.errors import BackendUnavailable
from pagemgr.native.build import Recipe, recipe

SPILLED_BYTES = {"prefill_kernel": 128}
"""What a kernel may spill; 0 for all others. At head dim 128 prefill holds 2 x 16 rows of outputs in 255 registers; on
compute capability 9.0 it runs where prefill_wgmma cannot."""


@dataclass(frozen=True)
class Built:
    library: Path
    report: str
    """What ptxas says of each kernel."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As ``pagemgr.native.build`` makes it, with ptxas's report."""
    try:
        made_by = recipe("cuda")
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    folder = tmp_path_factory.mktemp("cuda")
    running = [compile_unit(made_by, source, flags, folder) for source, flags in made_by.units]
    report = "".join(process.communicate()[0] for process in running)
    assert all(process.returncode == 0 for process in running), report
    library = folder / "libpagemgr_cuda.so"
    objects = [str(path) for path in folder.glob("*.o")]
    subprocess.run((made_by.compiler, *objects, *made_by.link_flags, "-o", str(library)), check=True)
    return Built(library, report)


def compile_unit(made_by: Recipe, source: Path, flags: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    command = (made_by.compiler, *flags, "-Xptxas", "-v", "-c", str(source), "-o", str(folder / f"{source.stem}.o"))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_spill_no_more_than_is_known(arch: str, built: Built) -> None:
    entry = rf"Compiling entry function '(\w+)' for '{arch}'\n.*?(\d+) bytes spill stores"
    kernels = re.findall(entry, built.report, re.DOTALL)
    assert len(kernels) >= 40
    for name, spilled in kernels:
        allowed = max((number for part, number in SPILLED_BYTES.items() if part in name), default=0)
        assert int(spilled) <= allowed, f"{name} spills {spilled} bytes on {arch}"


def test_warpgroups_get_their_registers_and_products_overlap(built: Built) -> None:
    """ptxas makes each wgmma wait for the one before, and says so, where it cannot follow what happens between them."""
    assert "prefill_wgmma_kernel" in built.report
    assert "serialized" not in built.report
    assert "setmaxnreg" not in built.report, "it is ignored"


def test_the_library_says_that_there_is_no_gpu(built: Built) -> None:
    if torch.cuda.is_available():
        assert NativeLibrary("cuda", built.library, "build it again").variant in {"sm_80", "sm_90a"}
        return
    with pytest.raises(BackendUnavailable, match="looking for a CUDA device failed"):
        NativeLibrary("cuda", built.library, "build it again")
    assert "no CUDA device" in str(CudaBackend.probe())
