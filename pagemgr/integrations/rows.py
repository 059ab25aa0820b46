"""A batch of left-padded rows, which is how Hugging Face models see text, kept as sequences of a pool.

    column    0   1   2   3   4   5        6 columns, padding included
    row 0     ·   ·   a   b   c   d        starts at column 2: a sequence of 4 tokens
    row 1     e   f   g   h   i   j        starts at column 0: a sequence of 6 tokens

Only real tokens have slots and are attended to; where there is padding, attention gives 0.

A forward begins with its first layer and counts once its last layer has attended. One that stopped in between (the
model raised) is taken back by whatever is done with the rows next. Token ids are not known here, so that blocks are
shared by ``take`` alone, and never found by their prefix.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from pagemgr.backends.interface import AttentionParams
from pagemgr.cache import PagedKVCache, Step
from pagemgr.errors import InvalidInput
from pagemgr.sequences import Sequence

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Forward:
    """One forward pass under way, over ``width`` columns."""

    step: Step
    width: int
    starts: tuple[int, ...]
    real: torch.Tensor | None
    """bool ``[batch, width]``, True where there is a token; None if that is everywhere."""
    next_layer: int = 0

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """The real tokens of ``[batch, heads, width, head_dim]`` as ``[tokens, heads, head_dim]``, row by row."""
        by_token = states.transpose(1, 2)
        return by_token.flatten(0, 1) if self.real is None else by_token[self.real]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """``[tokens, heads, head_dim]`` as ``[batch, width, heads, head_dim]``, 0 at padding."""
        shape = (len(self.starts), self.width, *packed.shape[1:])
        if self.real is None:
            return packed.view(shape)
        states = packed.new_zeros(shape)
        states[self.real] = packed
        return states


class PaddedRows:
    """The rows of one batch at a time; the pool should serve no other rows between two layers of a forward."""

    def __init__(self, pool: PagedKVCache) -> None:
        self.pool = pool
        self.length = 0
        """Columns that every layer has seen, padding included."""
        self._sequences: list[Sequence] = []
        self._starts: tuple[int, ...] = ()
        self._forward: _Forward | None = None

    @property
    def size(self) -> int:
        """Rows there are."""
        return len(self._sequences)

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: tuple[int, ...],
        params: AttentionParams,
    ) -> torch.Tensor:
        """Store the K and V of new columns and attend to all columns so far, layer after layer.

        ``query`` ``[batch, num_q_heads, width, head_dim]``, ``key`` and ``value`` ``[batch, num_kv_heads, width,
        head_dim]``; ``starts[i]`` is the column at which row ``i`` begins. Returns ``[batch, width, num_q_heads,
        head_dim]``. The first forward decides how many rows there are. Raises ``InvalidInput`` if the padding does
        not agree with earlier forwards or the layers do not come in order, and whatever ``PagedKVCache.step`` raises.
        """
        forward = self._begin(query.shape[0], query.shape[2], starts) if layer == 0 else self._under_way(layer, starts)
        tokens = forward.pack(query), forward.pack(key), forward.pack(value)
        out = forward.unpack(forward.step.attention(layer, *tokens, params))
        forward.next_layer += 1
        if forward.next_layer == self.pool.config.model.num_layers:
            forward.step.commit()
            self._forward, self._starts = None, starts
            self.length += forward.width
        return out

    def take(self, rows: SequenceOf[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was.

        A row named once stays in place, one named more often is forked, one not named ends. No block is copied until
        one of its sharers writes to it. Raises ``InvalidInput``, or ``OutOfSequences`` with nothing changed.
        """
        self._take_back()
        uses = Counter(rows)
        if not uses or not uses.keys() <= set(range(len(self._sequences))):
            raise InvalidInput(f"rows must be one or more of 0 to {len(self._sequences) - 1}, got {list(rows)}")
        ended = [sequence for row, sequence in enumerate(self._sequences) if row not in uses]
        self.pool.manager.table.require(max(len(rows) - len(self._sequences), 0))
        self.pool.free(ended)
        sharers = {row: [self._sequences[row]] for row in uses}
        for row, count in uses.items():
            if count > 1:
                sharers[row] += self.pool.fork(self._sequences[row], count - 1)
        self._starts = tuple(self._starts[row] for row in rows)
        self._sequences = [sharers[row].pop() for row in rows]

    def crop(self, columns: int) -> None:
        """Take the last ``columns`` columns away. Raises ``InvalidInput`` if there are fewer."""
        self._take_back()
        if not 0 <= columns <= self.length:
            raise InvalidInput(f"{columns} columns cannot be taken from the {self.length} there are")
        left = self.length - columns
        self.pool.manager.truncate(self._sequences, [max(left - start, 0) for start in self._starts])
        self.length = left

    def clear(self) -> None:
        """End all rows; the next forward may have any number of them."""
        self._take_back()
        self.pool.free(self._sequences)
        self._sequences, self._starts, self.length = [], (), 0

    def _begin(self, batch: int, width: int, starts: tuple[int, ...]) -> _Forward:
        self._take_back()
        if not self._sequences:
            self._sequences = self.pool.add_many([()] * batch)
        try:
            counts = self._counts(batch, width, starts)
            running = [row for row, count in enumerate(counts) if count]
            step = self.pool.step([self._sequences[row] for row in running], [counts[row] for row in running])
        except BaseException:
            self._take_back()
            raise
        real = None
        if min(counts) < width:
            padding = torch.tensor(starts, device=self.pool.device) - self.length
            real = torch.arange(width, device=self.pool.device) >= padding.unsqueeze(1)
        self._forward = _Forward(step, width, starts, real)
        return self._forward

    def _counts(self, batch: int, width: int, starts: tuple[int, ...]) -> list[int]:
        """New tokens of each row."""
        if batch != len(self._sequences):
            raise InvalidInput(f"this forward has {batch} rows, the cache holds {self.size}: reset the cache first")
        held = self.pool.manager.lengths(self._sequences).tolist()
        if held != [max(self.length - start, 0) for start in starts]:
            raise InvalidInput(
                f"the attention mask says that the rows start at columns {list(starts)}, but of {self.length} columns "
                f"they hold {held} tokens: every forward needs the padding of the ones before it in its mask"
            )
        counts = [min(max(self.length + width - start, 0), width) for start in starts]
        if not any(counts):
            raise InvalidInput(f"columns {self.length} to {self.length + width - 1} are padding in every row")
        return counts

    def _under_way(self, layer: int, starts: tuple[int, ...]) -> _Forward:
        forward = self._forward
        if forward is None or forward.next_layer != layer:
            expected = 0 if forward is None else forward.next_layer
            raise InvalidInput(f"layer {layer} attends, but it is the turn of layer {expected}: each once, in order")
        if forward.starts != starts:
            raise InvalidInput(f"rows start at {list(starts)} in layer {layer}, at {list(forward.starts)} in layer 0")
        return forward

    def _take_back(self) -> None:
        """Undo a forward that stopped half-way; rows that hold nothing yet go as well."""
        if self._forward is not None:
            _log.warning("a forward stopped before layer %d: it is taken back", self._forward.next_layer)
            self._forward.step.abort()
            self._forward = None
        if self.length == 0:
            self.pool.free(self._sequences)
            self._sequences, self._starts = [], ()
