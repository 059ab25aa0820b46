"""Run by ``test_backend_triton.py`` in a process of its own, as TRITON_INTERPRET=1 has to be set before the import."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pagemgr.backends import AttentionParams, Capabilities, KVLayer, registry
from pagemgr.backends.cases import attention_cases, base_case, build
from pagemgr.backends.conformance import TOLERANCE, ConformanceSuite
from pagemgr.backends.triton import attention, backend, library, sizes, widen
from pagemgr.backends.triton.backend import TritonBackend
from pagemgr.layout import BlockLayout, DType


class TestTritonInterpreted(ConformanceSuite):
    """The suite for a narrow declaration: what is cut out differs in numbers, not in code."""

    class backend(TritonBackend):
        def capabilities(self) -> Capabilities:
            return replace(
                super().capabilities(),
                head_dims=frozenset({24, 32}),
                group_sizes=frozenset({1, 5, 16}),
                block_sizes=frozenset({8, 16, 48}),
            )


def problem(**changes):
    case = replace(base_case(TritonBackend().capabilities()), head_dim=32, with_lse=False, **changes)
    return build(case, torch.Generator().manual_seed(11), "cpu")


def test_taken_by_name_where_it_is_interpreted() -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=2, head_dim=32, block_size=16, dtype=DType.float32)
    assert registry.create("triton", layout, 2, "cpu").name == "triton"


def test_a_pool_with_gaps_is_refused_by_copy_blocks() -> None:
    pool = torch.zeros(4, 3, 8)[:, :2]
    with pytest.raises(ValueError, match="contiguous"):
        TritonBackend().copy_blocks(pool, pool, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("words", [1, 2, 3, 4, 6, 8], ids="bytes-{}".format)
def test_blocks_of_any_size_are_copied(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    pool = torch.randint(0, 256, (6, words), dtype=torch.uint8, generator=generator)
    expected = pool.clone()
    expected[[4, 0]] = pool[[1, 5]]
    TritonBackend().copy_blocks(pool, pool, torch.tensor([[1, 4], [5, 0]]))
    assert torch.equal(pool, expected)


def test_a_negative_scale_and_a_scale_of_zero() -> None:
    for scale in (-0.4, 0.0, 1):
        given = replace(problem(), params=AttentionParams(scale=scale))
        out = TritonBackend().attention(given.query, given.kv, given.batch, given.params)
        torch.testing.assert_close(out.double(), given.expected()[0], atol=5e-5, rtol=5e-5)


def test_operations_pass_torchs_own_checks() -> None:
    given = problem()
    key = torch.randn(3, 2, 32)
    slots, out = torch.tensor([5, -1, 9]), torch.empty(given.query.shape)
    kv, batch = given.kv, given.batch
    tables = (batch.block_table, batch.seq_lens, batch.query_start, batch.slot_mapping)
    maxima = (batch.max_query_len, batch.max_seq_len)
    for operation, arguments in (
        (library.write_kv, (key, key + 1, kv.key, kv.value, None, None, slots)),
        (library.copy_blocks, (given.pool, given.pool.clone(), torch.tensor([[1, 2]]))),
        (library.merge, ([key, key + 1], [torch.randn(3, 2), torch.randn(3, 2)])),
        (
            library.attention,
            (
                given.query,
                kv.key,
                kv.value,
                None,
                None,
                *tables,
                *maxima,
                None,
                True,
                7,
                1.5,
                None,
                torch.randn(4),
                out,
                None,
            ),
        ),
    ):
        torch.library.opcheck(operation, arguments)


def test_a_compiled_step_has_no_graph_breaks_and_the_same_results() -> None:
    given, backend = problem(), TritonBackend()
    new = torch.randn(given.batch.num_tokens, 2, 32)

    def step(query: torch.Tensor, key: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv = KVLayer(pool[:, 0], pool[:, 1])
        backend.write_kv(key, key * 2, kv, given.batch.slot_mapping)
        lse = torch.empty(query.shape[:2])
        out = backend.attention(query, kv, given.batch, given.params, lse=lse)
        backend.copy_blocks(pool, pool, torch.tensor([[1, 0]]))
        return backend.merge([out, out + 1], [lse, lse])

    pools = [torch.stack((given.kv.key, given.kv.value), 1) for _ in range(2)]
    expected = step(given.query, new, pools[0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(given.query, new, pools[1])
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(pools[0].view(torch.int32), pools[1].view(torch.int32))


@pytest.mark.parametrize(("window", "kv_dtype"), [(None, torch.int8), (200, None)], ids=str)
def test_the_keys_of_few_long_queries_are_cut(
    window: int | None, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of queries, each in several shares; ``prefill`` has no part in it."""
    monkeypatch.setattr(sizes, "JOINING", 0)
    monkeypatch.delattr(attention, "prefill")
    given = problem(dtype=torch.float16, kv_dtype=kv_dtype, seqs=((700, 100),), kv_heads=1, window=window)
    lse = torch.full(given.query.shape[:2], torch.nan)
    out = TritonBackend().attention(given.query, given.kv, given.batch, given.params, lse=lse)
    expected = given.expected()
    torch.testing.assert_close(out.double(), expected[0], atol=TOLERANCE[torch.float16], rtol=TOLERANCE[torch.float16])
    torch.testing.assert_close(lse.double(), expected[1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("window", [None, 30])
def test_long_queries_widen_quantised_keys_once(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widen, "LEAST_TILES", 2)
    seqs = ((150, 100), (120, 100))
    given = problem(dtype=torch.float16, kv_dtype=torch.int8, seqs=seqs, window=window)
    prepared = attention.prepare(given.query, given.kv, given.batch, given.params, False)
    assert prepared.widening is not None
    out = TritonBackend().attention(given.query, given.kv, given.batch, given.params)
    torch.testing.assert_close(
        out.double(), given.expected()[0], atol=TOLERANCE[torch.float16], rtol=TOLERANCE[torch.float16]
    )


def test_the_layers_of_a_step_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[object] = []
    given, other = problem(seqs=((20, 1), (5, 1))), problem(seqs=((20, 1), (5, 1)))

    def prepare(*arguments: object) -> attention.Prepared:
        prepared.append(arguments)
        return attention.prepare(*arguments)

    monkeypatch.setattr(backend, "prepare", prepare)
    triton_backend = TritonBackend()
    for kv in (given.kv, other.kv, given.kv):
        out = triton_backend.attention(given.query, kv, given.batch, given.params)
        expected = replace(given, pool=other.pool, keys=other.keys, values=other.values) if kv is other.kv else given
        torch.testing.assert_close(out.double(), expected.expected()[0], atol=5e-5, rtol=5e-5)
    assert len(prepared) == 1
    triton_backend.attention(given.query, given.kv, given.batch, replace(given.params, window=3))
    triton_backend.attention(given.query, given.kv, replace(given.batch), given.params)
    assert len(prepared) == 3
    with pytest.raises(ValueError, match=r"query must be torch\.float32"):
        triton_backend.attention(given.query.half(), given.kv, given.batch, given.params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_read(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """It is written on GPUs alone: the interpreter rounds to it wrongly."""

    class Backend(TritonBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), kv_dtypes=frozenset({kv_dtype}))

    given = problem(dtype=dtype, kv_dtype=kv_dtype)
    out = Backend().attention(given.query, given.kv, given.batch, given.params)
    torch.testing.assert_close(out.double(), given.expected()[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_what_is_declared_is_what_is_run() -> None:
    """Bfloat16 is left to GPUs: the interpreter's product of it is wrong."""
    assert all(case.dtype is not torch.bfloat16 for _, case in attention_cases(TritonBackend().capabilities()))
