"""What the block manager promises (DESIGN §3-§6), in lists, dicts and tuples: slow, and obviously right.

Nothing is counted and nothing is hashed: the references of a block are the places that name it, and its name is every
token from the start of the sequence to the end of the block. Which block is given out is the manager's choice and is
handed to the model, which judges it: blanks come first and in any order, then what nobody holds, by LRU only in the
order of release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pagemgr.prefix import Namespace

from .state import Flight, Move, Part, Passed, Pool, Row


class Model:
    """The whole state of one manager."""

    def __init__(self, block_size: int, sizes: dict[str, int], caching: bool = True, by_release: bool = True) -> None:
        self.pins: list[list[int]] = []
        self.size, self.caching, self.by_release = block_size, caching, by_release
        self.pools = {tier: Pool(size) for tier, size in sizes.items()}
        self.rows: list[Row] = []
        self.flights: list[Flight] = []
        self.moves: list[Move] = []
        self.totals: Counter[str] = Counter()

    # What can be seen ---------------------------------------------------------------------------------------------

    def references(self, tier: str) -> Counter[int]:
        lists = [row.blocks for row in self.rows if row.tier == tier]
        lists += [blocks for move in self.moves if move.target == tier for blocks in move.moved]
        lists += self.pins if tier == "device" else []
        return Counter(block for blocks in lists for block in blocks)

    def states(self, tier: str) -> dict[int, str]:
        pool, references = self.pools[tier], self.references(tier)
        states = {0: "null"}
        for block in range(1, pool.size):
            if references[block]:
                states[block] = "full" if block in pool.names else "open"
            elif pool.held(block):
                states[block] = "fenced"
            else:
                states[block] = "cached" if block in pool.lru else "free"
        return states

    def count(self, tier: str, *states: str) -> int:
        return sum(state in states for state in self.states(tier).values())

    def waste(self, tier: str) -> int:
        """Slots of open blocks without a token: of a shared block, what the owner who filled most of it leaves."""
        most = {block: 0 for block, state in self.states(tier).items() if state == "open"}
        owners = [(row, row.blocks) for row in self.rows if row.tier == tier]
        owners += [pair for m in self.moves if m.target == tier for pair in zip(m.rows, m.moved, strict=True)]
        for row, blocks in owners:
            for column, block in enumerate(blocks):
                filled = min(max(row.computed - column * self.size, 0), self.size)
                most[block] = max(most.get(block, self.size), filled)
        return sum(self.size - filled for filled in most.values())

    def flying(self, row: Row) -> list[Flight]:
        return [flight for flight in self.flights if any(part.row is row for part in flight.parts)]

    def match(self, prompt: list[int], namespace: Namespace) -> list[int]:
        """Whole blocks of the prompt that are here; one token at least is left to run."""
        found: list[int] = []
        for end in range(self.size, len(prompt), self.size):
            block = self.pools["device"].find((namespace, tuple(prompt[:end])))
            if block is None:
                break
            found.append(block)
        return found

    # Blocks -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let go of what only waited for fences that have passed."""
        for tier, pool in self.pools.items():
            references = self.references(tier)
            for hold in [hold for hold in pool.holds if all(passed() for passed in hold[0])]:
                pool.holds.remove(hold)
                for block in hold[1]:
                    if not references[block] and not pool.held(block):
                        self._idle(pool, block)

    def take(self, tier: str, blocks: list[int]) -> None:
        """The manager gave out these: blanks while there are any, then cached ones, ``by_release`` the oldest."""
        pool, states = self.pools[tier], self.states(tier)
        free = sum(state == "free" for state in states.values())
        blanks, victims = blocks[:free], blocks[free:]
        assert len(set(blocks)) == len(blocks)
        assert all(states[block] == "free" for block in blanks), (tier, blanks, states)
        assert set(victims) <= set(pool.lru), (tier, victims, pool.lru)
        assert not self.by_release or victims == pool.lru[: len(victims)], (tier, victims, pool.lru)
        for block in victims:
            pool.lru.remove(block)
            del pool.names[block]
        pool.totals["allocated"] += len(blocks)
        pool.totals["evicted"] += len(victims)

    def release(self, tier: str, blocks: Iterable[int], fences: tuple[Passed, ...] = ()) -> None:
        """These places let go of their block, in this order; called when they no longer name it."""
        pool, references = self.pools[tier], self.references(tier)
        order = list(dict.fromkeys(reversed(list(blocks))))[::-1]  # a block named twice goes by its last mention
        if fences:
            pool.holds.append((fences, order))
        for block in order:
            if not references[block]:
                pool.totals["released"] += 1
                if not pool.held(block):
                    self._idle(pool, block)

    def fences(self, after: Passed | None = None) -> tuple[Passed, ...]:
        """``after``, and the end of every step now in flight."""
        numbers = {flight.number for flight in self.flights}
        ended = () if not numbers else (lambda: not any(flight.number in numbers for flight in self.flights),)
        return (() if after is None else (after,)) + ended

    def _idle(self, pool: Pool, block: int) -> None:
        if block in pool.names:
            pool.lru.append(block)

    def _acquired(self) -> None:
        for tier, pool in self.pools.items():
            references = self.references(tier)
            pool.lru = [block for block in pool.lru if not references[block]]

    # Verbs --------------------------------------------------------------------------------------------------------

    def add(self, prompt: list[int], namespace: Namespace, tail: int | None = None) -> Row:
        """``tail`` is a block after the whole ones that the manager found to begin like the rest of the prompt."""
        blocks = self.match(prompt, namespace) if self.caching else []
        whole = cached = len(blocks) * self.size
        if tail is not None:
            space, held = self.pools["device"].names[tail]
            assert (space, held[:whole], len(held)) == (namespace, tuple(prompt[:whole]), whole + self.size)
            while cached < min(len(held), len(prompt) - 1) and held[cached] == prompt[cached]:
                cached += 1
            assert cached > whole, "a block was shared of which nothing can be used"
            blocks.append(tail)
        self.rows.append(Row(namespace, prompt[:cached], list(blocks), cached, cached))
        self.totals["query"] += len(prompt)
        self.totals["hit"] += cached
        self._acquired()
        return self.rows[-1]

    def fork(self, row: Row) -> Row:
        self.rows.append(Row(row.namespace, list(row.tokens), list(row.blocks), row.computed, row.known, row.tier))
        return self.rows[-1]

    def truncate(self, rows: list[Row], lengths: list[int]) -> None:
        gone: dict[str, list[int]] = {tier: [] for tier in self.pools}
        for row, length in zip(rows, lengths, strict=True):
            keep = -(-length // self.size)
            gone[row.tier] += row.blocks[keep:][::-1]
            del row.blocks[keep:], row.tokens[length:]
            row.computed, row.known = length, min(row.known, length)
        for tier, blocks in gone.items():
            self.release(tier, blocks)

    def free(self, rows: list[Row], after: Passed | None = None) -> None:
        for row in rows:
            self.rows.remove(row)
            row.live = False
        for tier in self.pools:
            blocks = [block for row in rows if row.tier == tier for block in row.blocks[::-1]]
            self.release(tier, blocks, self.fences(after))

    def copied_tails(self, rows: list[Row]) -> dict[int, int]:
        """How many copies of each partly filled tail a step of these rows makes.

        Only a block's one owner writes in it, and only if it has no name and nobody who let go of it may still read it
        or get it back. The last of several owners in one batch is its one owner when the others have their copies.
        """
        pool, references = self.pools["device"], self.references("device")
        owners = Counter(row.blocks[-1] for row in rows if len(row.tokens) % self.size)
        stuck = {b for b, n in owners.items() if references[b] > n or b in pool.names or pool.held(b)}
        return {block: n if block in stuck else n - 1 for block, n in owners.items()}

    def growth(self, row: Row, count: int) -> int:
        return -(-(len(row.tokens) + count) // self.size) - len(row.blocks)

    def reserve(self, number: int, parts: list[Part], tails: dict[int, int], given: list[list[int]]) -> None:
        """``tails`` maps positions in the batch to the copy that replaced the tail, ``given`` is what each row got."""
        copies = Counter(part.row.blocks[-1] for i, part in enumerate(parts) if i in tails)
        assert copies == +Counter(self.copied_tails([part.row for part in parts]))
        kept = {part.row.blocks[-1] for i, part in enumerate(parts) if part.start % self.size and i not in tails}
        self.take("device", list(tails.values()) + [block for blocks in given for block in blocks])
        for i, part in enumerate(parts):
            row = part.row
            assert len(given[i]) == self.growth(row, len(part.new))
            if i in tails:
                part.tail, row.blocks[-1] = row.blocks[-1], tails[i]
            row.blocks += given[i]
            row.tokens += part.new
        flight = Flight(number, parts)
        self.flights.append(flight)
        replaced = [part.tail for part in parts if part.tail is not None and part.tail not in kept]
        if replaced:
            self.release("device", replaced, (lambda: all(one is not flight for one in self.flights),))
        self.totals["copies"] += len(tails)

    def commit(self, ids: list[bool], accepted: list[int] | None = None) -> None:
        """The oldest step has run; ``ids[i]`` says whether the manager was told the tokens of row ``i``.

        ``accepted[i]`` of them count, if given.
        """
        flight = self.flights.pop(0)
        if accepted is not None:
            self._refuse(flight, accepted)
        for part, told in zip(flight.parts, ids, strict=True):
            row, before = part.row, part.row.computed
            if not row.live:
                continue
            row.computed += len(part.new)
            self.totals["tokens"] += len(part.new)
            if told and self.caching and row.known == before:
                row.known = row.computed
                self._publish(row, before)
        self.totals["commits"] += 1

    def _refuse(self, flight: Flight, accepted: list[int]) -> None:
        gone: list[int] = []
        for part, count in zip(flight.parts, accepted, strict=True):
            row, end = part.row, part.start + count
            self.totals["drafts"] += len(part.new) - count
            if row.live and count < len(part.new):
                gone += row.blocks[-(-end // self.size) :][::-1]
                del row.blocks[-(-end // self.size) :], row.tokens[end:]
            part.new = part.new[:count]
        self.release("device", gone, self.fences())

    def pin(self, row: Row, length: int) -> list[int]:
        self.pins.append(row.blocks[: length // self.size])
        self._acquired()
        return self.pins[-1]

    def unpin(self, blocks: list[int]) -> None:
        self.pins = [pinned for pinned in self.pins if pinned is not blocks]
        self.release("device", blocks[::-1])

    def clear(self) -> int:
        cleared = 0
        for pool in self.pools.values():
            cleared += len(pool.lru)
            for block in pool.lru:
                del pool.names[block]
            pool.lru.clear()
        self.totals["cleared"] += cleared
        return cleared

    def _publish(self, row: Row, before: int) -> None:
        pool, duplicates = self.pools["device"], []
        for column in range(before // self.size, row.known // self.size):
            name = (row.namespace, tuple(row.tokens[: (column + 1) * self.size]))
            kept = pool.find(name)
            if kept is None:
                pool.names[row.blocks[column]] = name
            else:
                duplicates.append(row.blocks[column])
                row.blocks[column] = kept
        self._acquired()
        if duplicates:
            self.release("device", duplicates[::-1], self.fences())
        self.totals["duplicates"] += len(duplicates)

    def abort(self, flight: Flight) -> None:
        self.flights.remove(flight)
        gone: list[int] = []
        for part in (part for part in flight.parts if part.row.live):
            row = part.row
            keep = -(-part.start // self.size)
            gone += row.blocks[keep:]
            del row.blocks[keep:], row.tokens[part.start :]
            if part.tail is not None:
                gone.append(row.blocks[-1])
                row.blocks[-1] = part.tail
        self._acquired()
        self.release("device", gone)
        self.totals["aborts"] += 1

    # Tiers --------------------------------------------------------------------------------------------------------

    def plan_move(self, rows: list[Row], target: str) -> tuple[list[int], dict[int, int]]:
        """Which blocks of the source have to be copied, in token order, and those that the target holds."""
        source = next(tier for tier in self.pools if tier != target)
        blocks = list(dict.fromkeys(block for row in rows for block in row.blocks))
        found = {block: self._there(source, target, block) for block in blocks}
        return [b for b in blocks if found[b] is None], {b: there for b, there in found.items() if there is not None}

    def _there(self, source: str, target: str, block: int) -> int | None:
        name = self.pools[source].names.get(block)
        return None if name is None else self.pools[target].find(name)

    def begin(self, rows: list[Row], target: str, pairs: dict[int, int]) -> Move:
        missing, held = self.plan_move(rows, target)
        assert list(pairs) == missing
        move = Move(rows, target, [list(held.values())], pairs, {})
        self.moves.append(move)
        self._acquired()  # what the target holds is taken first, so that it is not evicted for the rest
        self.take(target, list(pairs.values()))
        where = pairs | held
        move.moved = [[where[block] for block in row.blocks] for row in rows]
        for row in rows:
            names = self.pools[row.tier].names
            move.names |= {pairs[block]: names[block] for block in row.blocks if block in pairs and block in names}
            row.moving = True
        return move

    def finish(self, move: Move, after: Passed | None = None) -> None:
        self.moves.remove(move)
        source = next(tier for tier in self.pools if tier != move.target)
        leaving = [block for row in move.rows for block in row.blocks[::-1]]
        for row, blocks in zip(move.rows, move.moved, strict=True):
            row.blocks, row.tier, row.moving = list(blocks), move.target, False
        self.release(source, leaving, self.fences(after))
        pool = self.pools[move.target]
        for block, name in move.names.items():
            kept = pool.find(name)
            if kept is None:
                pool.names[block] = name
                continue
            for row in move.rows:
                row.blocks = [kept if b == block else b for b in row.blocks]
            self._acquired()
            self.release(move.target, [block], self.fences(after))
        direction = "out" if move.target == "host" else "in"
        self.totals[f"blocks {direction}"] += len(move.pairs)
        self.totals[f"sequences {direction}"] += len(move.rows)

    def cancel(self, move: Move) -> None:
        self.moves.remove(move)
        for row in move.rows:
            row.moving = False
        self.release(move.target, [block for blocks in move.moved for block in blocks[::-1]])
        self.totals["cancel out" if move.target == "host" else "cancel in"] += 1
