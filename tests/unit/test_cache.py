"""``PagedKVCache``: what an engine sees of it, with attention compared to dense attention over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from managers import Gate

import pagemgr
from pagemgr import AttentionParams, OutOfBlocks, PagedKVCache, TransferFailed
from pagemgr.backends.oracle import dense_attention
from pagemgr.backends.reference import quantise
from pagemgr.config import Config, ModelConfig, PoolConfig
from pagemgr.layout import KVDType

LAYERS, Q_HEADS, KV_HEADS, DIM, BLOCK = 2, 4, 2, 8, 4


def make_cache(num_blocks: int = 40, host_blocks: int = 40, kv_dtype: KVDType = KVDType.auto) -> PagedKVCache:
    """A pool full of NaN: nothing that was not written may reach an output."""
    cache = PagedKVCache(
        Config(
            model=ModelConfig(
                num_layers=LAYERS, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, kv_dtype=kv_dtype
            ),
            pool=PoolConfig(num_blocks=num_blocks, host_blocks=host_blocks, block_size=BLOCK, max_sequences=16),
            device="cpu",
            backend="torch",
        )
    )
    for tensor in cache.storage.tiers.values():
        tensor[1:] = 0xFF  # NaN, whatever the type
    return cache


class Engine:
    """A model without weights: q, k and v of a token at a position are fixed random vectors, per layer."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        generator = torch.Generator().manual_seed(3)
        self.q, self.k, self.v = (
            torch.randn(LAYERS, 32, 256, heads, DIM, generator=generator) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
        )

    def vectors(self, table: torch.Tensor, layer: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        positions = torch.arange(start, start + len(tokens))
        return table[layer, torch.tensor(tokens, dtype=torch.long), positions]

    def run(self, step: pagemgr.Step, histories: list[list[int]], new: list[list[int]]) -> list[torch.Tensor]:
        """All layers of a step; the last layer's output by sequence."""
        out = torch.empty(0)
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([self.vectors(t, layer, n, len(h)) for h, n in zip(histories, new, strict=True)])
                for t in (self.q, self.k, self.v)
            )
            out = step.attention(layer, q, k, v)
        return list(out.split([len(n) for n in new]))

    def expected(self, history: list[int], new: list[int]) -> torch.Tensor:
        tokens = history + new
        q = self.vectors(self.q, LAYERS - 1, new, len(history))
        k, v = (self.held(self.vectors(t, LAYERS - 1, tokens, 0)) for t in (self.k, self.v))
        return dense_attention(q, k, v, AttentionParams())[0].float()

    def held(self, rows: torch.Tensor) -> torch.Tensor:
        """What the pool makes of keys or values."""
        if not self.cache.layout.quantised:
            return rows
        stored, scales = quantise(rows, getattr(torch, self.cache.layout.stored))
        return stored.double() * scales.double().unsqueeze(-1)

    def extend(self, seqs: list[pagemgr.Sequence], histories: list[list[int]], new: list[list[int]]) -> None:
        """One committed step, compared with dense attention."""
        with self.cache.step(seqs, new) as step:
            outs = self.run(step, histories, new)
            step.commit()
        for out, history, tokens in zip(outs, histories, new, strict=True):
            torch.testing.assert_close(out, self.expected(history, tokens), atol=1e-5, rtol=1e-5)
        for history, tokens in zip(histories, new, strict=True):
            history.extend(tokens)
        self.cache.manager.check()


@pytest.fixture
def engine() -> Engine:
    return Engine(make_cache())


@pytest.mark.parametrize("kv_dtype", list(KVDType))
def test_prefill_decode_fork_truncate_and_swap_give_dense_attention(kv_dtype: KVDType) -> None:
    engine = Engine(make_cache(kv_dtype=kv_dtype))
    cache = engine.cache
    prompt = [5, 1, 4, 4, 2, 9, 3, 3, 1, 7]
    seq, history = cache.add(prompt), list[int]()
    engine.extend([seq], [history], [prompt])
    kids = cache.fork(seq, 3)
    seqs, histories = [seq, *kids], [history, *(list(history) for _ in kids)]
    engine.extend(seqs, histories, [[11], [12, 13], [14], [15, 16, 17]])
    cache.truncate(seqs[1], 6)
    del histories[1][6:]
    engine.extend(seqs, histories, [[1], [2], [3], [4]])
    cache.swap_out(seqs[1:3])
    engine.extend([seqs[0], seqs[3]], [histories[0], histories[3]], [[8], [9]])
    cache.swap_in(seqs[1:3])
    engine.extend(seqs, histories, [[2], [2, 2, 2, 2, 2], [2], [2]])
    cache.free(seqs)
    cache.manager.check()
    assert cache.stats().device.used == 0
    again = cache.add([*histories[1], 30])
    assert again.num_cached_tokens == len(histories[1]) // BLOCK * BLOCK
    engine.extend([again], [histories[1][: again.num_cached_tokens]], [[*histories[1][again.num_cached_tokens :], 30]])


def test_leaving_a_step_by_an_exception_changes_nothing(engine: Engine) -> None:
    cache = engine.cache
    seq, history = cache.add(), list[int]()
    engine.extend([seq], [history], [[1, 2, 3, 4, 5]])
    (kid,) = cache.fork(seq)
    before = cache.stats()
    table = cache.manager.table.blocks.copy()
    with pytest.raises(ZeroDivisionError), cache.step([seq, kid], [[1] * 9, [2] * 9]) as step:  # noqa: PT012
        engine.run(step, [history, history], [[1] * 9, [2] * 9])
        _ = 1 // 0
    after = cache.stats()
    assert after.device.references == before.device.references
    assert (cache.manager.table.blocks == table).all()
    assert [cache.length(s) for s in (seq, kid)] == [5, 5]
    cache.manager.check()
    engine.extend([seq, kid], [history, list(history)], [[6], [7]])


def test_leaving_a_step_without_commit_aborts(engine: Engine) -> None:
    seq = engine.cache.add()
    with engine.cache.step([seq], [3]):
        assert engine.cache.stats().steps_in_flight == 1
    assert engine.cache.stats().steps_in_flight == 0
    assert engine.cache.length(seq) == 0


def test_an_ended_step_refuses_everything(engine: Engine) -> None:
    seq = engine.cache.add()
    step = engine.cache.step([seq], [[1, 2]])
    step.commit()
    for call in (step.commit, step.abort, lambda: step.attention(0, *[torch.zeros(2, 2, DIM)] * 3)):
        with pytest.raises(pagemgr.StepOrderError, match="already ended"):
            call()


def test_overlapped_steps_use_their_own_tensors(engine: Engine) -> None:
    """Two steps in flight, ids known late; both compute what they would have computed alone."""
    cache = engine.cache
    seq, history = cache.add(), list[int]()
    engine.extend([seq], [history], [[1, 2, 3]])
    first = cache.step([seq], [1])
    second = cache.step([seq], [1])
    outs = []
    for step, token in ((first, 4), (second, 5)):
        outs += engine.run(step, [history], [[token]])
        torch.testing.assert_close(outs[-1], engine.expected(history, [token]), atol=1e-5, rtol=1e-5)
        history.append(token)
    first.commit([[4]])
    second.commit([[5]])
    cache.manager.check()
    assert cache.add([1, 2, 3, 4, 5]).num_cached_tokens == 4


@pytest.mark.parametrize(
    ("layer", "q", "k", "message"),
    [
        (LAYERS, (2, Q_HEADS, DIM), (2, KV_HEADS, DIM), r"layer 2 is not in \[0, 2\)"),
        (0, (3, Q_HEADS, DIM), (2, KV_HEADS, DIM), "query must be"),
        (0, (2, 3, DIM), (2, KV_HEADS, DIM), "query must be"),
        (0, (2, Q_HEADS, DIM), (2, KV_HEADS + 1, DIM), "key and value must be"),
    ],
)
def test_wrong_shapes_are_refused(
    engine: Engine, layer: int, q: tuple[int, ...], k: tuple[int, ...], message: str
) -> None:
    seq = engine.cache.add()
    with engine.cache.step([seq], [[1, 2]]) as step, pytest.raises(pagemgr.InvalidInput, match=message):
        step.attention(layer, torch.zeros(q), torch.zeros(k), torch.zeros(k))


def test_out_of_blocks_leaves_the_batch_alone(engine: Engine) -> None:
    seqs = [engine.cache.add() for _ in range(3)]
    with pytest.raises(OutOfBlocks) as error:
        engine.cache.step(seqs, [60, 60, 60])
    assert (error.value.requested, error.value.available, error.value.tier) == (45, 39, "device")
    assert [engine.cache.length(seq) for seq in seqs] == [0, 0, 0]
    engine.cache.manager.check()


Fail = Callable[[], None]


def fail_on(n: int) -> Fail:
    """A function that raises at its n-th call, and counts down to it."""
    left = [n]

    def point() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("injected")

    return point


@pytest.mark.parametrize("direction", ["out", "in"])
def test_swap_failing_at_each_copy_moves_nothing(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The N-th copy fails, for every N until none does: the sequences stay, can be read, and the retry succeeds."""
    engine = Engine(make_cache(200, 200))
    cache = engine.cache
    scattered = [cache.add() for _ in range(3)]
    histories: list[list[int]] = [[], [], []]
    for token in range(6):  # interleaved growth scatters the blocks, so that a swap takes several copies
        engine.extend(scattered, histories, [[token] * 3, [token + 1] * 3, [token + 2] * 3])
    copy = torch.Tensor.copy_
    failures = 0
    while True:
        if direction == "in":
            cache.swap_out(scattered)
        point = fail_on(failures + 1)

        def failing(self: torch.Tensor, *args: object, point: Fail = point, **kwargs: object) -> torch.Tensor:
            point()
            return copy(self, *args, **kwargs)  # type: ignore[arg-type]

        tiers = cache.manager.table.tier.copy()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", failing)
            try:
                (cache.swap_out if direction == "out" else cache.swap_in)(scattered)
                break
            except TransferFailed as error:
                cause = error.__cause__
            assert isinstance(cause, OSError)
            failures += 1
        cache.manager.check()
        assert (cache.manager.table.tier == tiers).all()
        if direction == "in":
            cache.swap_in(scattered)
        engine.extend(scattered, histories, [[1], [2], [3]])
    assert failures >= 2
    assert cache.stats().counters.swap_failures[direction] == failures
    if direction == "out":
        cache.swap_in(scattered)
    engine.extend(scattered, histories, [[1], [2], [3]])


@pytest.mark.parametrize("direction", ["out", "in"])
def test_what_moved_is_reused_once_the_copy_is_done(
    engine: Engine, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is asynchronous on a GPU: its event stands between the source's blocks and their next owner."""
    cache, gate = engine.cache, Gate()
    seq = cache.add()
    engine.extend([seq], [[]], [[1, 2, 3, 4, 5]])
    if direction == "in":
        cache.swap_out([seq])
    source = cache.manager.tiers[0 if direction == "out" else 1].pool
    used = source.num_blocks - 1 - source.available
    monkeypatch.setattr(cache.storage, "execute", lambda copies, swapping: gate)
    (cache.swap_out if direction == "out" else cache.swap_in)([seq])
    assert cache.stats().tiers[0 if direction == "out" else 1].fenced == used > 0
    gate.passed = True
    assert cache.stats().tiers[0 if direction == "out" else 1].fenced == 0


@pytest.mark.parametrize("point", ["copies", "buffers"])
def test_a_step_that_cannot_start_reserves_nothing(engine: Engine, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = engine.cache
    seq, history = cache.add(), list[int]()
    engine.extend([seq], [history], [[1, 2, 3, 4, 5]])
    (kid,) = cache.fork(seq)

    def broken(*args: object) -> None:
        raise OSError("injected")

    with monkeypatch.context() as patch:
        if point == "copies":
            patch.setattr(cache.backend, "copy_blocks", broken)
        else:
            cache._idle_buffers.clear()
            patch.setattr(cache, "_make_buffers", broken)
        with pytest.raises(OSError, match="injected"):
            cache.step([seq, kid], [[6], [7]])
    assert cache.stats().steps_in_flight == 0
    cache.manager.check()
    engine.extend([seq, kid], [history, list(history)], [[6], [7]])


def test_open_reads_a_file(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "pagemgr.toml"  # type: ignore[operator]
    path.write_text('device = "cpu"\n[model]\nnum_layers = 1\nnum_kv_heads = 1\nhead_dim = 8\n[pool]\nsize = "64KiB"\n')
    cache = pagemgr.open(path)
    assert cache.manager.tiers[0].pool.num_blocks == 65536 // cache.layout.block_bytes
