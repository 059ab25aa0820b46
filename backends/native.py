"""Backends over compiled kernels: one for any library that implements ``native/pagemgr_abi.h``, see ``library``.

NativeBackend       any library, by its path: what ``backend = "/path/to/libmine.so"`` takes
└── BuiltBackend    the library that ``pagemgr.native.build`` makes for one target: ``cpu``, ``cuda``
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from pagemgr.batch import PagedBatch
from pagemgr.errors import BackendUnavailable, InvalidInput, UnsupportedFeature
from pagemgr.native.build import DEFAULT_CACHE_DIR, SOURCES, build, recipe

from .checks import check_attention, check_copy, check_merge, check_write, facts_of
from .interface import AttentionParams, Capabilities, KVLayer
from .library import NativeLibrary

_INT32_MAX = 2**31 - 1

_POINTERS = {
    "write_kv": ("key", "value", "kv.key", "kv.value", "kv.key_scale", "kv.value_scale", "slot_mapping"),
    "attention": ("query", "kv.key", "kv.value", "kv.key_scale", "kv.value_scale", "out", "lse", "workspace"),
}
"""Of a remembered call, those that each call sets anew."""

_KEPT = 64
"""Filled calls that are remembered; a step has as many as its model has kinds of layers, and as many again."""

_LAYERS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A filled call: a step asks the same of every layer, so that it is checked and filled once.

    It holds what its key names by identity, so that nothing else can take that name.
    """

    names: tuple[object, ...]
    args: Any
    words: memoryview
    """The same memory in words of 64 bits."""
    places: tuple[int, ...]
    """Of the pointers that a call sets, among those words."""
    workspace_bytes: int = 0

    def point_to(self, *tensors: torch.Tensor | None) -> None:
        """Where what this call reads and writes is."""
        words = self.words
        for place, tensor in zip(self.places, tensors, strict=True):
            if tensor is not None:  # else it was missing when the call was filled, and is null there
                words[place] = tensor.data_ptr()


class ErrorWords:
    """Where kernels note what was out of range: a word for each GPU, which the host reads without waiting for any.

    ``memory`` int32 ``[devices]``, zeros, pinned for GPUs. The words stay where they are as long as the backend lives,
    so that captured launches find theirs.
    """

    def __init__(self, library: NativeLibrary, memory: torch.Tensor) -> None:
        self._library = library
        self._memory = memory
        self._words = library.ffi.cast("int32_t *", memory.data_ptr())
        self._bytes = library.ffi.buffer(self._words, memory.nbytes)
        self._clean = self._bytes[:]

    def of(self, device: torch.device) -> Any:
        """The address of the device's word."""
        return self._words + (device.index or 0)

    def check(self) -> None:
        """Raise ``InvalidInput`` for what was noted since the last time, and forget it."""
        if self._bytes[:] == self._clean:
            return
        words = self._memory.tolist()
        self._memory.zero_()
        found = "; ".join(f"{self._library.describe(word)} (device {i})" for i, word in enumerate(words) if word)
        raise InvalidInput(f"in an earlier call, {found}: what was computed since then is not to be trusted")


def _stream(device: torch.device) -> int:
    """The device's current stream, 0 where there are none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


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
        offset = self.library.ffi.offsetof
        self._places = {
            function: tuple(offset(f"pagemgr_{function}_args", *name.split(".")) // 8 for name in names)
            for function, names in _POINTERS.items()
        }
        self._ready: dict[tuple[object, ...], _Prepared] = {}  # a call takes its own out, so that no two threads use it
        self._layers: dict[int, tuple[weakref.ref[KVLayer], int]] = {}
        self._kinds: dict[tuple[object, ...], int] = {}
        self._workspaces: dict[tuple[int, int], torch.Tensor] = {}
        self._errors: ErrorWords | None = None
        if not self.library.on_host:
            memory = torch.zeros(torch.cuda.device_count(), dtype=torch.int32, pin_memory=True)
            self._errors = ErrorWords(self.library, memory)

    @classmethod
    def _load(cls) -> NativeLibrary:
        return NativeLibrary(cls.name, cls.path, f"compile it for this machine against {SOURCES / 'pagemgr_abi.h'}")

    def capabilities(self) -> Capabilities:
        """What the library declares."""
        return self.library.capabilities

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer, slot_mapping: torch.Tensor) -> None:
        """See ``Backend.write_kv``."""
        tensors = (key, value, kv.key, kv.value, kv.key_scale, kv.value_scale, slot_mapping)
        new = facts_of(key), facts_of(value), facts_of(slot_mapping)
        call = (self._kind(kv), torch.get_num_threads(), _stream(key.device), new)
        ready = self._ready.pop(call, None)
        if ready is None:
            check_write(self, key, value, kv, slot_mapping)
            ready = self._prepare("write_kv", self._write_args(key, value, kv))
        ready.point_to(*tensors)
        self._call("write_kv", ready.args)
        self._keep(call, ready)

    def attention(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: PagedBatch,
        params: AttentionParams,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Backend.attention``."""
        device = query.device
        stream, given = _stream(device), (facts_of(query), facts_of(out), facts_of(lse))
        call = (id(batch), id(params), self._kind(kv), torch.get_num_threads(), stream, given)
        ready = self._ready.pop(call, None)
        if ready is None:
            check_attention(self, query, kv, batch, params, out, lse)
            args = self._attention_args(query, kv, batch, params)
            ready = self._prepare("attention", args, (batch, params), args.workspace_bytes)
        if out is None:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        workspace = self._workspace(ready.workspace_bytes, device, stream)
        ready.point_to(query, kv.key, kv.value, kv.key_scale, kv.value_scale, out, lse, workspace)
        self._call("attention", ready.args)
        self._keep(call, ready)
        return out

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
        """See ``Backend.copy_blocks``."""
        check_copy(source, target, pairs)
        if not (source[:1].is_contiguous() and target[:1].is_contiguous()):
            for parts in zip(source.unbind(1), target.unbind(1), strict=True):  # those are contiguous at last
                self.copy_blocks(*parts, pairs)
            return
        library, pairs = self.library, pairs.contiguous()
        args = library.ffi.new("pagemgr_copy_blocks_args *")
        self._set_run(args.run, pairs.device)
        args.source, args.target, args.pairs = map(library.pointer, (source, target, pairs))
        args.num_source_blocks, args.num_target_blocks = source.shape[0], target.shape[0]
        args.source_stride_bytes, args.target_stride_bytes = (t.stride(0) * t.itemsize for t in (source, target))
        args.block_bytes, args.num_pairs = source[:1].nbytes, pairs.shape[0]
        self._call("copy_blocks", args)

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
        args.num_rows, args.head_dim, args.dtype = lse.numel(), out.shape[2], self._dtype(out.dtype)
        self._call("merge", args)
        return out, lse

    def raise_for_errors(self) -> None:
        """Raise ``InvalidInput`` if kernels found what is out of range in tensors that the host does not look at.

        Waits for nothing: ask after synchronising to hear of all calls. Every call asks first, so that an error is
        raised by one of those after it; where kernels run on the host, by the call itself.
        """
        if self._errors is not None:
            self._errors.check()

    def _prepare(self, function: str, args: Any, names: tuple[object, ...] = (), workspace_bytes: int = 0) -> _Prepared:
        words = memoryview(self.library.ffi.buffer(args)).cast("q")
        return _Prepared(names, args, words, self._places[function], workspace_bytes)

    def _keep(self, call: tuple[object, ...], ready: _Prepared) -> None:
        if len(self._ready) >= _KEPT:
            self._ready.clear()
        self._ready[call] = ready

    def _kind(self, kv: KVLayer) -> int:
        """A number that layers share which differ in nothing but where they are."""
        known = self._layers.get(id(kv))
        if known is None or known[0]() is not kv:
            facts = tuple(map(facts_of, (kv.key, kv.value, kv.key_scale, kv.value_scale)))
            known = weakref.ref(kv), self._kinds.setdefault(facts, len(self._kinds))
            if len(self._layers) >= _LAYERS_KEPT:
                self._layers.clear()
            self._layers[id(kv)] = known
        return known[1]

    def _workspace(self, size: int, device: torch.device, stream: int) -> torch.Tensor:
        """Calls on one stream follow one another, and so share it; but a graph may be replayed beside any of them."""
        if self.library.on_host or torch.cuda.is_current_stream_capturing():
            return torch.empty(size, dtype=torch.uint8, device=device)
        kept = self._workspaces.get((device.index, stream))
        if kept is None or kept.numel() < size:
            self._workspaces[device.index, stream] = kept = torch.empty(size, dtype=torch.uint8, device=device)
        return kept

    def _write_args(self, key: torch.Tensor, value: torch.Tensor, kv: KVLayer) -> Any:
        """All but the pointers."""
        args = self.library.ffi.new("pagemgr_write_kv_args *")
        self._set_run(args.run, key.device)
        self._set_kv(args.kv, kv, key.dtype)
        args.key_token_stride, args.key_head_stride, _ = key.stride()
        args.value_token_stride, args.value_head_stride, _ = value.stride()
        args.num_tokens = key.shape[0]
        return args

    def _attention_args(self, query: torch.Tensor, kv: KVLayer, batch: PagedBatch, params: AttentionParams) -> Any:
        """All but the pointers that each call sets; the workspace's size is there."""
        library = self.library
        args = library.ffi.new("pagemgr_attention_args *")
        self._set_run(args.run, query.device)
        self._set_kv(args.kv, kv, query.dtype)
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

    def _call(self, function: str, args: Any) -> None:
        """Call; raise ``InvalidInput`` for what was out of range: here, if that is known when the call returns."""
        library = self.library
        if self._errors is not None:
            self._errors.check()
            library.call(function, args)
            return
        args.run.errors = errors = library.ffi.new("int32_t *")
        library.call(function, args)
        if errors[0]:
            raise InvalidInput(f"{function}: {library.describe(errors[0])}")

    def _set_run(self, run: Any, device: torch.device) -> None:
        run.num_threads = torch.get_num_threads()
        if device.type == "cuda":
            run.device_index = device.index
            run.stream = self.library.ffi.cast("void *", _stream(device))
        if self._errors is not None:
            run.errors = self._errors.of(device)

    def _set_kv(self, args: Any, kv: KVLayer, dtype: torch.dtype) -> None:
        key, value = kv.key, kv.value
        strides = key.stride()
        if value.stride() != strides:
            raise InvalidInput(f"kv.key and kv.value must have the same strides, got {strides} and {value.stride()}")
        args.key, args.value = self.library.pointer(key), self.library.pointer(value)
        args.block_stride, args.head_stride, args.token_stride, _ = strides
        args.num_blocks, args.num_kv_heads, args.block_size, args.head_dim = key.shape
        args.dtype, args.kv_dtype = self._dtype(dtype), self.library.kv_dtypes.get(key.dtype, 0)
        if kv.key_scale is not None and kv.value_scale is not None:
            strides = kv.key_scale.stride()
            if kv.value_scale.stride() != strides:
                raise InvalidInput(
                    f"kv.key_scale and kv.value_scale must have the same strides, got {strides} and "
                    f"{kv.value_scale.stride()}"
                )
            args.key_scale, args.value_scale = self.library.pointer(kv.key_scale), self.library.pointer(kv.value_scale)
            args.scale_block_stride, args.scale_head_stride, _ = strides

    def _dtype(self, dtype: torch.dtype) -> int:
        if dtype not in self.library.dtypes:
            raise UnsupportedFeature(self.name, (f"dtype {dtype} has no name in the native ABI",))
        return self.library.dtypes[dtype]


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
