"""A library of compiled kernels that implements ``native/pagemgr_abi.h``, loaded through cffi.

A library is trusted to keep the header's promises and nothing else: that it is whole, of this version, and complete is
checked when it is loaded, and what it declares decides what it is asked for.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cffi  # type: ignore[import-untyped]
import torch

from pagemgr.errors import BackendUnavailable, InternalError, InvalidInput, NativeAbiMismatch, UnsupportedFeature
from pagemgr.native.build import SOURCES

from .interface import Capabilities, Feature

_DEVICES = {"PAGEMGR_CPU": "cpu", "PAGEMGR_CUDA": "cuda"}
_DTYPES = {
    "PAGEMGR_FLOAT32": torch.float32,
    "PAGEMGR_FLOAT16": torch.float16,
    "PAGEMGR_BFLOAT16": torch.bfloat16,
}
_KV_DTYPES = {
    "PAGEMGR_KV_FLOAT8_E4M3FN": torch.float8_e4m3fn,
    "PAGEMGR_KV_FLOAT8_E5M2": torch.float8_e5m2,
    "PAGEMGR_KV_INT8": torch.int8,
}
_ERRORS = {
    "PAGEMGR_BAD_BLOCK": "a block id is not in the pool",
    "PAGEMGR_BAD_SLOT": "a slot is neither in the pool nor -1",
    "PAGEMGR_BAD_LENGTH": "a length is below 0 or above max_seq_len",
}
_STRUCTS = {
    "PAGEMGR_STRUCT_CAPABILITIES": "pagemgr_capabilities",
    "PAGEMGR_STRUCT_WRITE_KV": "pagemgr_write_kv_args",
    "PAGEMGR_STRUCT_ATTENTION": "pagemgr_attention_args",
    "PAGEMGR_STRUCT_COPY_BLOCKS": "pagemgr_copy_blocks_args",
    "PAGEMGR_STRUCT_MERGE": "pagemgr_merge_args",
}
FUNCTIONS = ("message", "get_capabilities", "attention_workspace", "write_kv", "attention", "copy_blocks", "merge")
_SYMBOLS = {name: f"pagemgr_{name}" for name in FUNCTIONS}


class NativeLibrary:
    """A loaded library: its functions, with a failed status raised as the exception that it stands for.

    Raises ``BackendUnavailable`` if the file is missing, cut short or no shared library for this machine, and
    ``NativeAbiMismatch`` if it is one, but does not implement the header of this pagemgr.
    """

    def __init__(self, backend: str, path: Path, remedy: str) -> None:
        self.backend, self.path, self._remedy = backend, path, remedy
        self.ffi = _ffi()
        self._void_pointer = self.ffi.typeof("void *")
        self.lib = self._open()
        self._compare()
        self.capabilities = self._read_capabilities()
        self.on_host = self.capabilities.devices == frozenset({"cpu"})
        """Whether a call is done when it returns."""
        self.dtypes: dict[torch.dtype, int] = {kind: getattr(self.lib, name) for name, kind in _DTYPES.items()}
        self.kv_dtypes: dict[torch.dtype, int] = {kind: getattr(self.lib, name) for name, kind in _KV_DTYPES.items()}

    def call(self, function: str, *args: Any) -> None:
        """Call ``pagemgr_<function>``. This is the one place where a status becomes an exception."""
        status = getattr(self.lib, _SYMBOLS[function])(*args)
        if status:
            raise self._error(function, status)

    def describe(self, errors: int) -> str:
        """An error word, in words."""
        return ", ".join(text for name, text in _ERRORS.items() if errors & getattr(self.lib, name))

    def _error(self, function: str, status: int) -> Exception:
        message = self.ffi.string(self.lib.pagemgr_message()).decode(errors="replace")
        if status == self.lib.PAGEMGR_INVALID:
            return InvalidInput(f"{function}: {message}")
        if status == self.lib.PAGEMGR_UNSUPPORTED:
            return UnsupportedFeature(self.backend, (message,))
        if status == self.lib.PAGEMGR_DEVICE:
            return BackendUnavailable(self.backend, message)
        return InternalError(f"{self.path}: {function} returned the unknown status {status}: {message}")

    def pointer(self, tensor: torch.Tensor) -> Any:
        """To the first element, for any pointer of the ABI: the header's structs take ``void *`` for each of theirs."""
        return self.ffi.cast(self._void_pointer, tensor.data_ptr())

    def _open(self) -> Any:
        if not self.path.is_file():
            raise BackendUnavailable(self.backend, f"there is no library {self.path}: {self._remedy}")
        if not _is_whole(self.path):
            raise BackendUnavailable(self.backend, f"{self.path} is no shared library, or cut short: {self._remedy}")
        try:
            return self.ffi.dlopen(str(self.path.resolve()))
        except OSError as error:
            raise BackendUnavailable(self.backend, f"{self.path} does not load: {error}: {self._remedy}") from error

    def _compare(self) -> None:
        try:
            found, wanted = self.lib.pagemgr_abi_version(), self.lib.PAGEMGR_ABI_VERSION
        except AttributeError:
            raise self._mismatch("it does not have pagemgr_abi_version, so it is no library for pagemgr") from None
        if found != wanted:
            raise self._mismatch(f"it implements version {found} of the ABI, this pagemgr needs {wanted}")
        for function in ("struct_size", *FUNCTIONS):
            if not hasattr(self.lib, f"pagemgr_{function}"):
                raise self._mismatch(f"it does not have pagemgr_{function}")
        for constant, name in _STRUCTS.items():
            size, expected = self.lib.pagemgr_struct_size(getattr(self.lib, constant)), self.ffi.sizeof(name)
            if size != expected:
                raise self._mismatch(f"its {name} has {size} bytes, that of this pagemgr {expected}")

    def _mismatch(self, reason: str) -> NativeAbiMismatch:
        return NativeAbiMismatch(self.backend, self.path, f"{reason}: {self._remedy}")

    def _read_capabilities(self) -> Capabilities:
        declared = self.ffi.new("pagemgr_capabilities *")
        self.call("get_capabilities", declared)
        device = next((kind for name, kind in _DEVICES.items() if declared.device == getattr(self.lib, name)), None)
        if device is None:
            raise self._mismatch(f"it declares the unknown device {declared.device}")
        self.variant = self.ffi.string(declared.variant).decode(errors="replace")
        return Capabilities(
            devices=frozenset({device}),
            dtypes=frozenset(kind for name, kind in _DTYPES.items() if declared.dtypes >> getattr(self.lib, name) & 1),
            kv_dtypes=frozenset(
                kind for name, kind in _KV_DTYPES.items() if declared.kv_dtypes >> getattr(self.lib, name) & 1
            ),
            head_dims=_numbers(declared.head_dims),
            group_sizes=_numbers(declared.group_sizes),
            block_sizes=_numbers(declared.block_sizes),
            features=frozenset(
                one for one in Feature if declared.features & getattr(self.lib, f"PAGEMGR_{one.name.upper()}")
            ),
            graph_capture=bool(declared.graph_capture),
        )


@functools.cache
def _ffi() -> Any:
    """The header, parsed: 10 ms."""
    ffi = cffi.FFI()
    ffi.cdef((SOURCES / "pagemgr_abi.h").read_text(encoding="utf-8"))
    return ffi


def _numbers(declared: Sequence[int]) -> frozenset[int] | None:
    """A list of the ABI, which ends at its first 0; None, "any", if that is its first number."""
    numbers = list(declared)
    end = numbers.index(0) if 0 in numbers else len(numbers)
    return frozenset(numbers[:end]) or None


def _is_whole(path: Path) -> bool:
    """Whether a file is a 64-bit ELF object none of whose segments is cut off: to load one that is would be a crash."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        order = "<" if header[5] == 1 else ">"
        (table,) = struct.unpack_from(f"{order}Q", header, 32)
        entry_size, count = struct.unpack_from(f"{order}HH", header, 54)
        file.seek(table)
        entries = file.read(entry_size * count)
    if entry_size < 56 or len(entries) < entry_size * count:
        return False
    ends = (sum(struct.unpack_from(f"{order}8xQ16xQ", entries, entry_size * i)) for i in range(count))
    return max(ends, default=0) <= path.stat().st_size
