"""What one forward pass reads and writes, as tensors. The only place where block ids become tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's view of the pool, for ``num_seqs`` sequences with ``num_tokens`` new tokens in all.

    The new tokens of sequence ``i`` are rows ``query_start[i]:query_start[i + 1]`` of the step's query, key and value
    tensors; they are the last ``query_start[i + 1] - query_start[i]`` of its ``seq_lens[i]`` tokens. Prefill, chunked
    prefill and decode differ in nothing else.
    """

    block_table: torch.Tensor
    """int32 ``[num_seqs, width]``: block ids in token order; entries past a sequence's end are the null block."""
    seq_lens: torch.Tensor
    """int32 ``[num_seqs]``: tokens in the cache once this step's were written. 0 means an empty row."""
    query_start: torch.Tensor
    """int32 ``[num_seqs + 1]``: cumulative counts of new tokens."""
    slot_mapping: torch.Tensor
    """int64 ``[num_tokens]``: ``block_id * block_size + offset`` of each new token, -1 to write nothing."""
    max_query_len: int
    """Most new tokens of any sequence; known on the host so that a launch needs no synchronisation."""
    max_seq_len: int
    """Longest sequence, in tokens."""

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return int(self.seq_lens.shape[0])

    @property
    def num_tokens(self) -> int:
        """New tokens in the batch."""
        return int(self.slot_mapping.shape[0])
