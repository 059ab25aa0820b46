"""What one forward pass reads and writes, as tensors. The only place where block ids become tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import Plan


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


class _Buffer:
    """One array of a batch on the device, at an address that never changes, filled through pinned host memory."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)
        on_gpu = device.type == "cuda"
        self._staging = torch.zeros(size, dtype=dtype, pin_memory=True) if on_gpu else self.tensor

    def fill(self, data: torch.Tensor) -> torch.Tensor:
        """The leading elements, shaped as ``data`` and holding it."""
        n = data.numel()
        self._staging[:n] = data.reshape(-1)
        if self._staging is not self.tensor:
            self.tensor[:n].copy_(self._staging[:n], non_blocking=True)
        return self.tensor[:n].view(data.shape)


class BatchBuffers:
    """The tensors of one step in flight. A step holds a set from ``reserve`` until it ends, then the next reuses it."""

    def __init__(self, device: torch.device, max_sequences: int, num_groups: int, width: int, max_tokens: int) -> None:
        self._device = device
        self._block_table = _Buffer(num_groups * max_sequences * width, torch.int32, device)
        self._seq_lens = _Buffer(max_sequences, torch.int32, device)
        self._query_start = _Buffer(max_sequences + 1, torch.int32, device)
        self._slot_mapping = _Buffer(num_groups * max_tokens, torch.int64, device)
        self._uploaded: torch.cuda.Event | None = None

    def fill(self, plan: Plan) -> tuple[PagedBatch, ...]:
        """The batch of a plan as each layer group sees it, uploaded on the current stream."""
        if self._uploaded is not None:
            self._uploaded.synchronize()  # the staging memory may not change under a copy that is still under way
        seq_lens, num_seqs = plan.seq_lens, plan.num_seqs
        tables = self._block_table.fill(torch.from_numpy(plan.block_table)).chunk(plan.num_groups)
        slots = self._slot_mapping.fill(torch.from_numpy(plan.slot_mapping)).chunk(plan.num_groups)
        lens = self._seq_lens.fill(torch.from_numpy(seq_lens))
        starts = self._query_start.fill(torch.from_numpy(plan.query_start[: num_seqs + 1]))
        queries, longest = int(plan.counts.max()), int(seq_lens.max())
        batches = tuple(
            PagedBatch(table, lens, starts, slot_mapping, queries, longest)
            for table, slot_mapping in zip(tables, slots, strict=True)
        )
        if self._device.type == "cuda":
            self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._uploaded.record(torch.cuda.current_stream(self._device))
        return batches
