"""The ``cpu`` backend: C++ with SIMD and threads, the embedded default where there is no GPU."""

from __future__ import annotations

from .native import BuiltBackend


class CpuBackend(BuiltBackend):
    """Paged attention over host memory by ``native/cpu``, on as many threads as torch uses."""

    name = "cpu"
