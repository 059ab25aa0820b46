"""The ``cuda`` backend: CUDA C++ of our own, for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import torch

from .native import BuiltBackend


class CudaBackend(BuiltBackend):
    """Paged attention over device memory by ``native/cuda``."""

    name = "cuda"

    @classmethod
    def probe(cls) -> str | None:
        """Why the library cannot be built or has nothing to run on, if so."""
        if not torch.cuda.is_available():
            return "torch finds no CUDA device: install a driver and the CUDA build of torch"
        return super().probe()
