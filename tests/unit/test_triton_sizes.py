"""Tile sizes fit the chip: kernels are compiled for an H100, which needs no GPU, and asked for their shared memory."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

from triton import compile as compile_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pagemgr.backends.triton.decode import decode_kernel  # noqa: E402
from pagemgr.backends.triton.prefill import prefill_kernel  # noqa: E402
from pagemgr.backends.triton.sizes import (  # noqa: E402
    DECODED_ROWS,
    MANY_ITEMS,
    decode_sizes,
    pays_to_cut,
    power_of_two,
    prefill_sizes,
)

SHARED_BYTES_OF_A_CTA = 227 * 1024
SHARED_BYTES_OF_ALL = 228 * 1024
RESERVED_BYTES_OF_A_CTA = 1024
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8"}
POINTERS = {"block_table": "*i32", "seq_lens": "*i32", "query_start": "*i32", "scratch": "*fp32"}


def shared_bytes(
    kernel, dtype: torch.dtype, kv_dtype: torch.dtype, constants: dict[str, object], warps: int, stages: int
) -> int:
    """Of one CTA, compiled for compute capability 9.0 with no optional feature."""
    constants = constants | dict.fromkeys(("lse", "slopes", "sinks", "softcap", "window"))
    tensors = dict.fromkeys(("query", "out"), f"*{NAMES[dtype]}") | dict.fromkeys(
        ("key", "value"), f"*{NAMES[kv_dtype]}"
    )
    scales = dict.fromkeys(("key_scale", "value_scale"), "*fp32")
    if kv_dtype is dtype:
        constants |= dict.fromkeys(scales)
    types = dict.fromkeys(kernel.arg_names, "i32") | tensors | scales | POINTERS | {"scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    at = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    aligned = [*tensors, "scratch", *(name for name in kernel.arg_names if name.startswith("stride_"))]
    source = ASTSource(
        kernel,
        signature,
        {at[name]: value for name, value in constants.items()},
        {at[name]: [["tt.divisibility", 16]] for name in aligned if name in at},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return int(compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "dim", "group", "most_new", "items"),
    [
        (torch.bfloat16, torch.bfloat16, 128, 4, 1, 8),
        (torch.bfloat16, torch.bfloat16, 128, 4, 1, MANY_ITEMS),
        (torch.bfloat16, torch.bfloat16, 256, 4, 16, 8),
        (torch.float32, torch.float32, 256, 4, 16, MANY_ITEMS),
        (torch.bfloat16, torch.float8_e4m3fn, 256, 4, 1, 8),
        (torch.bfloat16, torch.float8_e4m3fn, 128, 4, 1, MANY_ITEMS),
        (torch.bfloat16, torch.int8, 256, 4, 16, 8),
        (torch.bfloat16, torch.bfloat16, 128, 4, 128, 8),
        (torch.bfloat16, torch.float8_e4m3fn, 256, 4, 128, 8),
    ],
)
def test_decode(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, group: int, most_new: int, items: int) -> None:
    sizes = decode_sizes(dtype, kv_dtype, dim, group, most_new, items)
    constants = {"BLOCK_SIZE": 16, "DIM": dim, "PADDED_DIM": dim, "CAUSAL": True, "CHAINED": True, "SEQS": 32}
    constants["TOKENS"] = sizes.rows // group
    used = shared_bytes(
        decode_kernel, dtype, kv_dtype, constants | {"ROWS": sizes.rows, "TILE": sizes.tile}, sizes.warps, sizes.stages
    )
    assert used <= SHARED_BYTES_OF_A_CTA
    assert sizes.ctas_per_sm * (used + RESERVED_BYTES_OF_A_CTA) <= SHARED_BYTES_OF_ALL


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "dim"),
    [
        (torch.bfloat16, torch.bfloat16, 128),
        (torch.bfloat16, torch.bfloat16, 256),
        (torch.float32, torch.float32, 256),
        (torch.bfloat16, torch.float8_e4m3fn, 128),
        (torch.bfloat16, torch.float8_e4m3fn, 256),
    ],
)
def test_prefill(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int) -> None:
    sizes = prefill_sizes(dtype, dim, quantised=kv_dtype is not dtype)
    constants = {"BLOCK_SIZE": 16, "DIM": dim, "PADDED_DIM": dim, "CAUSAL": True}
    constants |= {"ROWS": sizes.rows, "TOKENS": sizes.rows // 4, "TILE": sizes.tile}
    assert shared_bytes(prefill_kernel, dtype, kv_dtype, constants, sizes.warps, sizes.stages) <= SHARED_BYTES_OF_A_CTA


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16, 31, 32])
@pytest.mark.parametrize("most_new", [1, 2, 7, 64])
@pytest.mark.parametrize("items", [1, MANY_ITEMS])
def test_rows_hold_the_queries(group: int, most_new: int, items: int) -> None:
    sizes = decode_sizes(torch.bfloat16, torch.bfloat16, 128, group, most_new, items)
    needed = group * most_new if group * most_new <= DECODED_ROWS else group  # of long queries, a tile at a time
    assert needed <= sizes.rows == power_of_two(sizes.rows)
    assert 16 <= sizes.tile == power_of_two(sizes.tile)


def test_power_of_two() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 80, 128)] == [1, 1, 2, 4, 4, 8, 128, 128]


@pytest.mark.parametrize(
    ("items", "tiles", "pays"),
    [(32, 512, True), (128, 512, False), (160, 128, True), (32, 8, False), (1, 1, False), (512, 512, False)],
)
def test_keys_are_cut_where_multiprocessors_would_be_idle_for_long(items: int, tiles: int, pays: bool) -> None:
    assert pays_to_cut(items, tiles, slots=132) is pays
