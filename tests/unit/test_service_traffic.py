"""A trace as traffic: everything that an engine meets happens, over and over, and the pool stays sound."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

import pagemgr
from pagemgr.errors import InvalidInput
from pagemgr.service.traffic import trace_steps
from pagemgr.traces import Request


def make_cache(num_blocks: int = 40, host_blocks: int = 60, max_seq_len: int = 128) -> pagemgr.PagedKVCache:
    return pagemgr.PagedKVCache(
        pagemgr.Config(
            model={"num_layers": 1, "num_kv_heads": 1, "head_dim": 8},
            pool={
                "num_blocks": num_blocks,
                "block_size": 4,
                "host_blocks": host_blocks,
                "max_seq_len": max_seq_len,
                "max_sequences": 8,
            },
            device="cpu",
        )
    )


def request(prompt: int, output: int, ids: tuple[int, ...] = (), id_tokens: int = 16) -> Request:
    return Request(0.0, prompt, output, np.array(ids, dtype=np.int64), id_tokens)


TRACE = [request(20, 40, (1,)), request(40, 30, (1, 2)), request(8, 60), request(36, 20, (1, 2)), request(1, 50)]


def test_pressure_swaps_evictions_and_hits_all_happen_and_it_goes_round_and_round() -> None:
    cache = make_cache()
    seen = set()
    for number, _ in enumerate(islice(trace_steps(cache, TRACE), 600)):
        stats = cache.stats()
        seen |= {name for name in ("swapped",) if stats.counters.swapped_sequences["in"]}
        seen |= {"evicted"} if stats.device.evicted_total else set()
        seen |= {"hit"} if stats.counters.prefix_hit_tokens else set()
        seen |= {"refused"} if stats.counters.failures["out_of_blocks"] else set()
        if number % 50 == 0:
            cache.manager.check()
    assert seen == {"swapped", "evicted", "hit", "refused"}
    assert cache.stats().counters.prefix_query_tokens > 3 * sum(one.input_length for one in TRACE)
    cache.manager.check()


def test_without_a_host_tier_the_youngest_starts_over() -> None:
    cache = make_cache(host_blocks=0)
    for _ in islice(trace_steps(cache, TRACE), 300):
        pass
    stats = cache.stats()
    assert stats.counters.failures["out_of_blocks"] > 0
    assert stats.counters.prefix_query_tokens > 2 * sum(one.input_length for one in TRACE)
    cache.manager.check()


def test_requests_that_do_not_fit_are_passed_over_or_refused() -> None:
    cache = make_cache()
    for _ in islice(trace_steps(cache, [request(500, 1), request(10, 5)]), 50):
        pass
    assert cache.stats().counters.prefix_query_tokens % 10 == 0
    with pytest.raises(InvalidInput, match=r"shortest has 300 tokens, pool\.max_seq_len is 128; raise"):
        trace_steps(cache, [request(300, 1), request(500, 1)])
