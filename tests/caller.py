"""One engine's worth of random calls: adds, runs, forks, swaps and frees sequences of its own, and never by mistake."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pagemgr.errors import OperatingError, StepOrderError
from pagemgr.manager import BlockManager
from pagemgr.plan import Plan, Transfer
from pagemgr.prefix import Namespace
from pagemgr.sequences import Sequence


class Caller:
    """Calls one manager, alone or beside others. What it did is in ``done``, what it decided in ``plans``."""

    def __init__(self, manager: BlockManager, seed: int) -> None:
        self.manager = manager
        self.rng = np.random.default_rng(seed)
        self.here: list[Sequence] = []
        self.in_host: list[Sequence] = []
        self.flying: list[tuple[Plan, list[Sequence], list[np.ndarray]]] = []
        self.done: Counter[str] = Counter()
        self.plans: list[list[int]] = []

    def act(self) -> None:
        """One call. What is refused for want of room, or because another caller's step is older, is left alone."""
        verbs = [self.add, self.reserve, self.reserve, self.commit, self.commit, self.abort]
        verbs += [self.fork, self.truncate, self.free, self.swap_out, self.swap_in]
        verb = verbs[self.rng.integers(len(verbs))]
        try:
            if verb():
                self.done[verb.__name__] += 1
        except (OperatingError, StepOrderError) as error:
            self.done[type(error).__name__] += 1

    def tokens(self, most: int) -> np.ndarray:
        return self.rng.integers(0, 3, self.rng.integers(1, most + 1))

    def some(self, sequences: list[Sequence]) -> list[Sequence]:
        """Up to three of them that no step of ours is in flight for."""
        busy = {sequence for _, named, _ in self.flying for sequence in named}
        idle = [sequence for sequence in sequences if sequence not in busy]
        return [idle[i] for i in self.rng.permutation(len(idle))[:3]]

    def add(self) -> bool:
        space = Namespace(tenant=str(self.rng.integers(2)))
        self.here += self.manager.add_many([self.tokens(9), self.tokens(9)], [space, None])
        return True

    def reserve(self) -> bool:
        if named := [self.here[i] for i in self.rng.permutation(len(self.here))[:4]]:
            tokens = [self.tokens(5) for _ in named]
            late = self.rng.integers(2) == 1
            plan = self.manager.reserve(named, [len(new) for new in tokens] if late else tokens)
            self.flying.append((plan, named, tokens if late else []))
            self.plans += [plan.block_table.ravel().tolist(), plan.slot_mapping.tolist()]
        return bool(named)

    def commit(self) -> bool:
        ended = self.flying[:1]
        for plan, _, late in ended:
            self.manager.commit(plan, late or None)
            self.flying.pop(0)
        return bool(ended)

    def abort(self) -> bool:
        ended = self.flying[-1:]
        for plan, _, _ in ended:
            self.manager.abort(plan)
            self.flying.pop()
        return bool(ended)

    def fork(self) -> bool:
        if named := self.some(self.here):
            self.here += self.manager.fork(named[0], 2)
        return bool(named)

    def truncate(self) -> bool:
        if named := self.some(self.here + self.in_host):
            lengths = [int(self.rng.integers(0, length + 1)) for length in self.manager.lengths(named)]
            self.manager.truncate(named, lengths)
        return bool(named)

    def free(self) -> bool:
        named = [self.here[i] for i in self.rng.permutation(len(self.here))[:3]] + self.in_host[:1]
        self.manager.free(named)
        self.here = [sequence for sequence in self.here if sequence not in named]
        self.in_host = [sequence for sequence in self.in_host if sequence not in named]
        return bool(named)

    def swap_out(self) -> bool:
        if named := self.some(self.here):
            self.end(self.manager.swap_out(named), named, self.here, self.in_host)
        return bool(named)

    def swap_in(self) -> bool:
        if named := self.in_host[:2]:
            self.end(self.manager.swap_in(named), named, self.in_host, self.here)
        return bool(named)

    def end(self, transfer: Transfer, named: list[Sequence], source: list[Sequence], target: list[Sequence]) -> None:
        self.plans += [blocks.tolist() for blocks in transfer.moved]
        if self.rng.integers(4) == 0:
            self.manager.cancel(transfer)
            return
        self.manager.finish(transfer)
        for sequence in named:
            source.remove(sequence)
            target.append(sequence)
