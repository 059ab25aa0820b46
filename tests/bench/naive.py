"""A block manager as it is usually first written: an object for each block, dicts and lists, one sequence at a time.

What it does is what the benchmark asks of both: prefix match, SHA-256 of full blocks, reference counts, copy-on-write
of shared tails, LRU eviction, block tables and slot mappings as arrays. It checks nothing and cannot abort.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque

import numpy as np


class Block:
    def __init__(self, number: int) -> None:
        self.number = number
        self.refs = 0
        self.name: bytes | None = None


class Row:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.blocks: list[Block] = []
        self.names: list[bytes] = []


class NaiveManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.blanks = deque(Block(i) for i in range(1, num_blocks))
        self.cached: OrderedDict[bytes, Block] = OrderedDict()
        self.known: dict[bytes, Block] = {}

    def add(self, prompt: list[int]) -> tuple[Row, int]:
        row = Row()
        name = b"root"
        for start in range(0, (len(prompt) - 1) // self.size * self.size, self.size):
            name = self.hash(name, prompt[start : start + self.size])
            block = self.known.get(name)
            if block is None:
                break
            if block.refs == 0:
                del self.cached[name]
            block.refs += 1
            row.blocks.append(block)
            row.names.append(name)
        hit = len(row.blocks) * self.size
        row.tokens = list(prompt[:hit])
        return row, hit

    def hash(self, parent: bytes, tokens: list[int]) -> bytes:
        return hashlib.sha256(parent + np.array(tokens, dtype=np.int32).tobytes()).digest()

    def take(self) -> Block:
        if self.blanks:
            block = self.blanks.popleft()
        else:
            name, block = self.cached.popitem(last=False)
            del self.known[name]
            block.name = None
        block.refs = 1
        return block

    def step(self, rows: list[Row], new: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Block table and slots of a batch; its tokens count at once."""
        slots: list[int] = []
        for row, tokens in zip(rows, new, strict=True):
            for token in tokens:
                offset = len(row.tokens) % self.size
                if offset == 0:
                    row.blocks.append(self.take())
                elif row.blocks[-1].refs > 1:
                    row.blocks[-1].refs -= 1
                    row.blocks[-1] = self.take()
                slots.append(row.blocks[-1].number * self.size + offset)
                row.tokens.append(token)
                if offset == self.size - 1:
                    name = self.hash(row.names[-1] if row.names else b"root", row.tokens[-self.size :])
                    row.names.append(name)
                    if name not in self.known:
                        self.known[name] = row.blocks[-1]
                        row.blocks[-1].name = name
        table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.blocks)] = [block.number for block in row.blocks]
        return table, np.array(slots, dtype=np.int64)

    def fork(self, row: Row, n: int) -> list[Row]:
        children = []
        for _ in range(n):
            child = Row()
            child.tokens, child.blocks, child.names = list(row.tokens), list(row.blocks), list(row.names)
            for block in row.blocks:
                block.refs += 1
            children.append(child)
        return children

    def truncate(self, row: Row, length: int) -> None:
        keep = -(-length // self.size)
        self.release(row.blocks[keep:])
        del row.blocks[keep:], row.tokens[length:], row.names[length // self.size :]

    def free(self, row: Row) -> None:
        self.release(row.blocks)

    def release(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0:
                if block.name is None:
                    self.blanks.append(block)
                else:
                    self.cached[block.name] = block
