"""An engine with far too little memory serves thousands of requests: all get the right bytes, and no block is lost."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from device import Device, Event, Reader
from managers import KINDS, Make, states

from pagemgr.errors import OutOfBlocks
from pagemgr.manager import BlockManager
from pagemgr.plan import Plan
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence

REQUESTS = 2_000
ROWS = 7


@dataclass(eq=False)
class Request:
    """``tokens`` grow as they are generated, up to ``length``; ``computed`` of them have K and V.

    ``values`` is what a slot holds for each token: it depends on the namespace and on every token up to its own.
    """

    namespace: Namespace
    length: int
    tokens: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    computed: int = 0
    handle: Sequence | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.values.append(hash((self.values[-1] if self.values else self.namespace, token)))


class Engine:
    """Admits what has a row, and makes room by preempting the newest: to the host, or by computing it again."""

    def __init__(self, manager: BlockManager, seed: int) -> None:
        self.manager, self.rng = manager, np.random.default_rng(seed)
        self.device = Device(manager.block_size)
        stems = [self.rng.integers(0, 9, 12).tolist() for _ in range(3)]
        self.waiting = deque(self._request(stems) for _ in range(REQUESTS))
        self.running: list[Request] = []
        self.swapped: deque[Request] = deque()
        self.done: Counter[str] = Counter()
        self.has_left = False

    def _request(self, stems: list[list[int]]) -> Request:
        rng = self.rng
        prompt = stems[rng.integers(len(stems))][: rng.integers(13)] + rng.integers(0, 9, rng.integers(1, 9)).tolist()
        request = Request(Namespace(tenant=str(rng.integers(2))), len(prompt) + int(rng.integers(1, 10)))
        for token in prompt:
            request.append(token)
        return request

    def serve(self) -> None:
        while self.waiting or self.running or self.swapped:
            self._resume()
            while self.waiting and not self.swapped and len(self.running) < ROWS:
                request = self.waiting.popleft()
                request.handle = self.manager.add(request.tokens, request.namespace)
                request.computed = request.handle.num_cached_tokens
                self.running.append(request)
            self._step()
            self._retire()
        while self.device.readers:
            self._let_pass()

    def _resume(self) -> None:
        """The oldest come back once somebody has left, or nobody runs: then there is room."""
        if self.running and not self.has_left:
            return
        self.has_left = False
        try:
            while self.swapped:
                self._move(self.manager.swap_in, self.swapped[0])
                self.running.append(self.swapped.popleft())
        except OutOfBlocks:
            if not self.running:
                self._let_pass()

    def _step(self) -> None:
        plan: Plan | None = None
        while self.running and plan is None:
            tokens = [request.tokens[request.computed :] for request in self.running]
            try:
                plan = self.manager.reserve([request.handle for request in self.running], tokens)
            except OutOfBlocks:
                self._preempt(self.running.pop())
        if plan is None:
            self._let_pass()
            return
        for table, start in zip(plan.block_table, plan.starts, strict=True):
            self.device.poison("device", [block for block in table[-(-start // self.device.size) :].tolist() if block])
        self.device.launch(plan, [list(request.values) for request in self.running])
        self.device.run_through(plan.step)
        self.manager.commit(plan)
        for request in self.running:
            request.computed = len(request.tokens)
            request.append(int(self.rng.integers(9)))

    def _preempt(self, request: Request) -> None:
        try:
            self._move(self.manager.swap_out, request)
            self.swapped.appendleft(request)
            self.done["swapped out"] += 1
        except OutOfBlocks:
            self.manager.free([request.handle])
            self.waiting.appendleft(request)
            self.done["dropped"] += 1

    def _move(self, verb: object, request: Request) -> None:
        transfer = verb([request.handle])  # type: ignore[operator]
        self.device.move(transfer)
        self.manager.finish(transfer)

    def _retire(self) -> None:
        """Who is done leaves behind a fence that passes some steps later."""
        for request in [request for request in self.running if request.computed >= request.length]:
            self.running.remove(request)
            assert request.handle is not None
            table, event = self.manager.table, Event()
            blocks = table.blocks[request.handle.row, : table.num_blocks[request.handle.row]].tolist()
            self.device.readers.append(Reader("device", blocks, request.values[: request.computed], event))
            self.manager.free([request.handle], after=event)
            self.done["served"] += 1
            self.has_left = True
        while len(self.device.readers) > 3:
            self._let_pass()

    def _let_pass(self) -> None:
        assert self.device.readers, "an empty device has no room for one sequence"
        self.device.let_pass(self.device.readers[0].until)


@KINDS
def test_thousands_of_requests_return_to_the_baseline(make: Make) -> None:
    manager = make(30, 4, max_sequences=ROWS + 8, max_seq_len=32, num_host_blocks=6)
    engine = Engine(manager, 0)
    engine.serve()
    manager.check()
    assert engine.done["served"] == REQUESTS
    assert min(engine.done["swapped out"], engine.done["dropped"]) > 20
    stats = manager.stats()
    assert (stats.sequences, stats.steps_in_flight, stats.counters.invariant_violations) == (0, 0, 0)
    assert states(manager).keys() | states(manager, 1).keys() == {"free", "cached"}
    assert sum(states(manager).values()) == 29
    assert stats.hit_ratio > 0.1
    assert stats.device.evicted_total > REQUESTS
