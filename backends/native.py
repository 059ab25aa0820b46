"""The one door to compiled kernels: loads a library that implements ``native/pagemgr_abi.h``, and is a backend over it.

    NativeBackend       any library, by its path: what ``backend = "/path/to/libmine.so"`` takes
    └── BuiltBackend    the library that ``pagemgr.native.build`` makes for one target: ``cpu``, ``cuda``

A library is trusted to keep the header's promises and nothing else: that it is whole, of this version, and complete is
checked when it is loaded, and what it declares decides what it is asked for.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import cffi  # type: ignore[import-untyped]
import torch

from pagemgr.batch import PagedBatch
from pagemgr.errors import BackendUnavailable, InternalError, InvalidInput, NativeAbiMismatch, UnsupportedFeature
from pagemgr.native.build import DEFAULT_CACHE_DIR, SOURCES, build, recipe

from .checks import check_attention, check_copy, check_merge, check_write
from .interface import AttentionParams, Capabilities, Feature, KVLayer

_INT32_MAX = 2**31 - 1

_DEVICES = {"PAGEMGR_CPU": "cpu", "PAGEMGR_CUDA": "cuda"}
_DTYPES = {
    "PAGEMGR_FLOAT32": torch.float32,
    "PAGEMGR_FLOAT16": torch.float16,
    "PAGEMGR_BFLOAT16": torch.bfloat16,
}
_STRUCTS = {
    "PAGEMGR_STRUCT_CAPABILITIES": "pagemgr_capabilities",
    "PAGEMGR_STRUCT_WRITE_KV": "pagemgr_write_kv_args",
    "PAGEMGR_STRUCT_ATTENTION": "pagemgr_attention_args",
    "PAGEMGR_STRUCT_COPY_BLOCKS": "pagemgr_copy_blocks_args",
    "PAGEMGR_STRUCT_MERGE": "pagemgr_merge_args",
}
FUNCTIONS = ("message", "get_capabilities", "attention_workspace", "write_kv", "attention", "copy_blocks", "merge")


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
        self.dtypes: dict[torch.dtype, int] = {kind: getattr(self.lib, name) for name, kind in _DTYPES.items()}

    def call(self, function: str, *args: Any) -> None:
        """Call ``pagemgr_<function>``. This is the one place where a status becomes an exception."""
        status = getattr(self.lib, f"pagemgr_{function}")(*args)
        if status:
            raise self._error(function, status)

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
            head_dims=_numbers(declared.head_dims),
            group_sizes=_numbers(declared.group_sizes),
            block_sizes=_numbers(declared.block_sizes),
            features=frozenset(
                one for one in Feature if declared.features & getattr(self.lib, f"PAGEMGR_{one.name.upper()}")
            ),
            graph_capture=bool(declared.graph_capture),
        )


_CHANGING = ("query", "out", "workspace", "lse")
_KEPT = 64
"""Checked calls of one batch; a model has as many as it has kinds of layers."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A call of ``attention`` that was checked, and its struct without the pointers that differ from layer to layer."""

    params: AttentionParams
    args: Any


def _layout(tensor: torch.Tensor | None) -> object:
    """All that a check of a tensor may look at."""
    return tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class NativeBackend:
    """A library as a backend; what the methods mean is written in ``pagemgr.backends.Backend``."""

    name = "native"
    path: ClassVar[Path]
    """The library; see ``at``."""

    @classmethod
    def at(cls, path: str | Path) -> type[Self]:
        """The backend over the library at this path, whose name is the path."""
        return type(cls.__name__, (cls,), {"name": str(path), "path": Path(path).expanduser()})

    @classmethod
    def probe(cls) -> str | None:
        """Why the library cannot be loaded, if so."""
        try:
            cls._load()
        except BackendUnavailable as error:
            return error.reason
        return None

    def __init__(self) -> None:
        self.library = self._load()
        self._step: tuple[PagedBatch | None, dict[tuple[object, ...], _Prepared]] = (None, {})
        offset, struct = self.library.ffi.offsetof, "pagemgr_attention_args"
        self._word = {name: offset(struct, name) // 8 for name in _CHANGING}
        self._word |= {name: offset(struct, "kv", name) // 8 for name in ("key", "value")}
        self._word["stream"] = offset(struct, "run", "stream") // 8

    @classmethod
    def _load(cls) -> NativeLibrary:
        return NativeLibrary(cls.name, cls.path, f"compile it for this machine against {SOURCES / 'pagemgr_abi.h'}")

    def capabilities(self) -> Capabilities:
        """What the library declares."""
        return self.library.capabilities

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        check_write(self, key, value, kv, slot_mapping)
        library = self.library
        args = library.ffi.new("pagemgr_write_kv_args *")
        self._set_run(args.run, key.device)
        self._set_kv(args.kv, kv)
        args.key, args.value = library.pointer(key), library.pointer(value)
        args.slot_mapping = library.pointer(slot_mapping)
        args.key_token_stride, args.key_head_stride, _ = key.stride()
        args.value_token_stride, args.value_head_stride, _ = value.stride()
        args.num_tokens = key.shape[0]
        library.call("write_kv", args)

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Backend.attention``.

        The layers of a step ask the same of the same batch, and differ in pointers alone: that is checked once.
        """
        ffi, word, device = self.library.ffi, self._word, query.device
        prepared = self._prepare(query, kv, batch, params, out, lse)
        out = torch.empty(query.shape, dtype=query.dtype, device=device) if out is None else out
        args = ffi.new("pagemgr_attention_args *", prepared.args)
        workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8, device=device)
        words = ffi.cast("int64_t *", args)
        words[word["query"]], words[word["out"]] = query.data_ptr(), out.data_ptr()
        words[word["key"]], words[word["value"]] = kv.key.data_ptr(), kv.value.data_ptr()
        words[word["workspace"]] = workspace.data_ptr()
        if lse is not None:
            words[word["lse"]] = lse.data_ptr()
        if device.type == "cuda":
            words[word["stream"]] = torch.cuda.current_stream(device).cuda_stream
        self.library.call("attention", args)
        return out

    def _prepare(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> _Prepared:
        """The struct for this call, filled anew unless this batch has been asked the same."""
        known, kept = self._step
        if known is not batch or len(kept) > _KEPT:
            kept = {}
            self._step = (batch, kept)
        call = (id(params), torch.get_num_threads(), *map(_layout, (query, kv.key, kv.value, out, lse)))
        prepared = kept.get(call)
        if prepared is None:
            check_attention(self, query, kv, batch, params, out, lse)
            prepared = kept[call] = _Prepared(params, self._attention_args(query, kv, batch, params)[0])
        return prepared

    def copy_blocks(self, pool: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        check_copy(pool, pairs)
        if not pool[:1].is_contiguous():  # a slice of wider blocks: its parts are contiguous at last
            for part in pool.unbind(1):
                self.copy_blocks(part, pairs)
            return
        library, pairs = self.library, pairs.contiguous()
        args = library.ffi.new("pagemgr_copy_blocks_args *")
        self._set_run(args.run, pool.device)
        args.pool, args.pairs = library.pointer(pool), library.pointer(pairs)
        args.num_blocks, args.num_pairs = pool.shape[0], pairs.shape[0]
        args.block_bytes, args.block_stride_bytes = pool[:1].nbytes, pool.stride(0) * pool.itemsize
        library.call("copy_blocks", args)

    def merge(self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Backend.merge``."""
        check_merge(outs, lses)
        library, ffi = self.library, self.library.ffi
        outs, lses = ([part.contiguous() for part in parts] for parts in (outs, lses))
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        out_pointers = ffi.new("const void *[]", [library.pointer(part) for part in outs])
        lse_pointers = ffi.new("const float *[]", [library.pointer(part) for part in lses])
        args = ffi.new("pagemgr_merge_args *")
        self._set_run(args.run, out.device)
        args.outs, args.lses, args.num_parts = out_pointers, lse_pointers, len(outs)
        args.out, args.lse = library.pointer(out), library.pointer(lse)
        args.num_rows, args.head_dim, args.dtype = lse.numel(), out.shape[2], self._dtype(out)
        library.call("merge", args)
        return out, lse

    def _attention_args(self, query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams) -> Any:
        """All but the memory that is written: ``out``, ``lse`` and ``workspace``, whose size is there."""
        library = self.library
        args = library.ffi.new("pagemgr_attention_args *")
        self._set_run(args.run, query.device)
        self._set_kv(args.kv, kv)
        args.query = library.pointer(query)
        args.block_table, args.table_stride = library.pointer(batch.block_table), batch.block_table.stride(0)
        args.seq_lens, args.query_start = library.pointer(batch.seq_lens), library.pointer(batch.query_start)
        for name, tensor in (("alibi_slopes", params.alibi_slopes), ("sinks", params.sinks)):
            if tensor is not None:
                setattr(args, name, library.pointer(tensor))
        args.query_token_stride, args.query_head_stride, _ = query.stride()
        args.num_tokens, args.num_q_heads, head_dim = query.shape
        args.num_seqs = batch.seq_lens.shape[0]
        args.max_query_len, args.max_seq_len = batch.max_query_len, batch.max_seq_len
        args.causal, args.window = params.causal, min(params.window or 0, _INT32_MAX)
        args.scale = head_dim**-0.5 if params.scale is None else params.scale
        args.softcap = params.softcap or 0.0
        size = library.ffi.new("int64_t *")
        library.call("attention_workspace", args, size)
        args.workspace_bytes = size[0]
        return args

    def _set_run(self, run: Any, device: torch.device) -> None:
        run.num_threads = torch.get_num_threads()
        if device.type == "cuda":
            run.device_index = device.index
            run.stream = self.library.ffi.cast("void *", torch.cuda.current_stream(device).cuda_stream)

    def _set_kv(self, args: Any, kv: KVLayer) -> None:
        key, value = kv.key, kv.value
        strides = key.stride()
        if value.stride() != strides:
            raise InvalidInput(f"kv.key and kv.value must have the same strides, got {strides} and {value.stride()}")
        args.key, args.value = self.library.pointer(key), self.library.pointer(value)
        args.block_stride, args.head_stride, args.token_stride, _ = strides
        args.num_blocks, args.num_kv_heads, args.block_size, args.head_dim = key.shape
        args.dtype = self._dtype(key)

    def _dtype(self, tensor: torch.Tensor) -> int:
        if tensor.dtype not in self.library.dtypes:
            raise UnsupportedFeature(self.name, (f"dtype {tensor.dtype} has no name in the native ABI",))
        return self.library.dtypes[tensor.dtype]


class BuiltBackend(NativeBackend):
    """A backend over the library that is built here, on first use, from the sources that pagemgr ships."""

    cache_dir: ClassVar[str] = DEFAULT_CACHE_DIR
    """Where it is kept: the setting ``native.cache_dir``."""

    @classmethod
    def cached_in(cls, cache_dir: str) -> type[Self]:
        """The same backend with its library in another cache directory."""
        return type(cls.__name__, (cls,), {"cache_dir": cache_dir})

    @classmethod
    def probe(cls) -> str | None:
        """Why the library cannot be built, if so. It is not built for this."""
        try:
            recipe(cls.name)
        except BackendUnavailable as error:
            return error.reason
        return None

    @classmethod
    def _load(cls) -> NativeLibrary:
        path = build(recipe(cls.name), cls.cache_dir)
        return NativeLibrary(cls.name, path, f"delete {path}, and it is built again")


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
