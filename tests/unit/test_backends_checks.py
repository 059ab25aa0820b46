"""Every wrong argument is refused with its name, before anything is written."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from pagemgr.backends import AttentionParams, Backend, Feature, KVLayer
from pagemgr.backends.cases import Case, Problem, build
from pagemgr.backends.reference import TorchBackend
from pagemgr.errors import InvalidInput

CASE = Case(torch.float32, head_dim=8, block_size=4, group_size=3, seqs=((5, 2), (3, 3)))
BACKEND = TorchBackend()


@pytest.fixture
def problem() -> Problem:
    return build(CASE, torch.Generator().manual_seed(1), "cpu")


def test_the_torch_backend_is_a_backend() -> None:
    assert isinstance(BACKEND, Backend)
    assert BACKEND.probe() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1 token, got 0"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        ({"softcap": -2.0}, "got -2.0"),
        ({"softcap": math.inf}, "got inf"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
    ],
)
def test_parameters_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        AttentionParams(**settings)  # type: ignore[arg-type]


def test_features_of_parameters() -> None:
    assert AttentionParams().features(with_lse=False) == {Feature.causal}
    every = AttentionParams(None, False, 4, 1.0, torch.ones(2), torch.ones(2))
    assert every.features(with_lse=True) == set(Feature) - {Feature.causal}


def quantised(problem: Problem) -> KVLayer:
    parts, scale = (problem.kv.key, problem.kv.value), torch.ones(problem.kv.key.shape[:3])
    return KVLayer(*(part.to(torch.int8) for part in parts), scale, scale)


ATTENTION_FAULTS = {
    "query must have 3 dimensions": lambda p: {"query": p.query[0]},
    "query has 5 heads, which is not a multiple of the 2 K/V heads": lambda p: {"query": p.query[:, :5]},
    r"query must have shape \[5, 6, 8\], got \[4, 6, 8\]": lambda p: {"query": p.query[:4]},
    r"query must have shape \[5, 6, 8\], got \[5, 6, 4\]": lambda p: {"query": p.query[..., :4]},
    "query must be torch.float32, got torch.float16": lambda p: {"query": p.query.half()},
    "query must be on cpu, got meta": lambda p: {"query": p.query.to("meta")},
    "the last dimension of query must be contiguous": lambda p: {
        "query": p.query.transpose(1, 2).contiguous().transpose(1, 2)
    },
    "kv.key must have 4 dimensions": lambda p: {"kv": KVLayer(p.kv.key[0], p.kv.value[0])},
    "kv.value must have shape": lambda p: {"kv": KVLayer(p.kv.key, p.kv.value[1:])},
    "kv.value must be torch.float32": lambda p: {"kv": KVLayer(p.kv.key, p.kv.value.double())},
    "kv.key_scale is given, with keys and values stored as torch.float32": lambda p: {
        "kv": replace(p.kv, key_scale=torch.ones(p.kv.key.shape[:3]))
    },
    "kv.value_scale is missing, with keys and values stored as torch.int8": lambda p: {
        "kv": replace(quantised(p), value_scale=None)
    },
    r"kv.key_scale must have shape \[\d+, 2, \d+\], got": lambda p: {
        "kv": replace(quantised(p), key_scale=torch.ones(p.kv.key.shape[1:3]))
    },
    "kv.value_scale must be torch.float32": lambda p: {
        "kv": replace(quantised(p), value_scale=torch.ones(p.kv.key.shape[:3]).half())
    },
    "kv.value must be torch.int8": lambda p: {"kv": replace(quantised(p), value=p.kv.value)},
    "batch.block_table must be torch.int32, got torch.int64": lambda p: {
        "batch": replace(p.batch, block_table=p.batch.block_table.long())
    },
    r"batch.block_table must have shape \[2, 4\], got \[1, 4\]": lambda p: {
        "batch": replace(p.batch, block_table=p.batch.block_table[:1])
    },
    "batch.seq_lens must be torch.int32": lambda p: {"batch": replace(p.batch, seq_lens=p.batch.seq_lens.long())},
    r"batch.query_start must have shape \[3\], got \[2\]": lambda p: {
        "batch": replace(p.batch, query_start=p.batch.query_start[1:])
    },
    r"alibi_slopes must have shape \[6\], got \[2\]": lambda p: {"params": AttentionParams(alibi_slopes=torch.ones(2))},
    "sinks must be torch.float32": lambda p: {"params": AttentionParams(sinks=torch.ones(6).half())},
    "out must be torch.float32": lambda p: {"out": torch.zeros(5, 6, 8).double()},
    "out must be contiguous": lambda p: {"out": torch.zeros(5, 7, 8)[:, :6]},
    r"lse must have shape \[5, 6\], got \[6, 5\]": lambda p: {"lse": torch.zeros(6, 5)},
}


@pytest.mark.parametrize("message", ATTENTION_FAULTS)
def test_attention_refuses(problem: Problem, message: str) -> None:
    out, lse = torch.zeros(5, 6, 8), torch.zeros(5, 6)
    call = {"query": problem.query, "kv": problem.kv, "batch": problem.batch, "params": problem.params}
    call |= {"out": out, "lse": lse} | ATTENTION_FAULTS[message](problem)
    with pytest.raises(InvalidInput, match=message):
        BACKEND.attention(**call)
    assert not out.any()
    assert not lse.any()


WRITE_FAULTS = {
    r"key must have shape \[3, 2, 8\], got \[4, 2, 8\]": lambda t: {"key": torch.ones(4, 2, 8)},
    "value must be torch.float32, got torch.bfloat16": lambda t: {"value": t.bfloat16()},
    "slot_mapping must be torch.int64, got torch.int32": lambda t: {"slot_mapping": torch.zeros(3, dtype=torch.int32)},
    "slot_mapping must have 1 dimensions": lambda t: {"slot_mapping": torch.zeros(3, 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", WRITE_FAULTS)
def test_write_kv_refuses(problem: Problem, message: str) -> None:
    tokens = torch.ones(3, 2, 8)
    before = problem.pool.clone()
    call = {"key": tokens, "value": tokens, "kv": problem.kv, "slot_mapping": torch.tensor([4, 5, 6])}
    with pytest.raises(InvalidInput, match=message):
        BACKEND.write_kv(**(call | WRITE_FAULTS[message](tokens)))
    assert torch.equal(problem.pool, before)


@pytest.mark.parametrize("pairs", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)])
def test_copy_blocks_refuses(problem: Problem, pairs: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="pairs must"):
        BACKEND.copy_blocks(problem.pool, problem.pool, pairs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(4, 3, 7), r"blocks alike, got torch.float32 \[3, 8\] and torch.float32 \[3, 7\]"),
        (torch.zeros(4, 3, 8).half(), r"blocks alike, got torch.float32 \[3, 8\] and torch.float16"),
        (torch.zeros(4, 3, 8, device="meta"), "source must be on meta or in pinned host memory, got host memory that"),
    ],
)
def test_copy_blocks_refuses_tiers_that_do_not_match(other: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        BACKEND.copy_blocks(torch.zeros(4, 3, 8), other, torch.zeros(1, 2, dtype=torch.int64, device=other.device))


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one; got 0 and 0"),
        ([torch.ones(2, 3, 4)], [], "got 1 and 0"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)], r"outs\[0\] must have 3 dimensions"),
        ([torch.ones(2, 3, 4), torch.ones(1, 3, 4)], [torch.ones(2, 3)] * 2, r"outs\[1\] must have shape"),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 3).half()], r"lses\[0\] must be torch.float32"),
    ],
)
def test_merge_refuses(outs: list[torch.Tensor], lses: list[torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        BACKEND.merge(outs, lses)


def test_nothing_is_recorded_for_gradients(problem: Problem) -> None:
    query = problem.query.clone().requires_grad_()
    tokens = torch.ones(1, 2, 8, requires_grad=True)
    BACKEND.write_kv(tokens, tokens, problem.kv, torch.tensor([0]))
    out = BACKEND.attention(query, problem.kv, problem.batch, problem.params)
    assert not out.requires_grad
    assert not problem.pool.requires_grad


def test_fresh_cases_differ_by_seed_and_repeat_by_seed() -> None:
    first, again, other = (build(CASE, torch.Generator().manual_seed(seed), "cpu") for seed in (1, 1, 2))
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.batch.block_table, again.batch.block_table)
    assert not torch.equal(first.query, other.query)
    owned = set(itertools.chain.from_iterable(first.batch.block_table.tolist())) - {0}
    assert len(owned) == 3
