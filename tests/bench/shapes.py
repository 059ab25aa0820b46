"""The batches that attention is timed on, and what others were measured to reach on some of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Self

FEW = 16
"""New tokens a sequence up to which a batch counts as decoding: reading K and V is most of the work."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences of ``lens`` tokens, of which the last ``news`` are new; ``group`` query heads for each K/V head."""

    lens: tuple[int, ...]
    news: tuple[int, ...]
    kv_heads: int
    group: int
    head_dim: int
    block_size: int = 16
    note: str = ""

    @classmethod
    def uniform(cls, batch: int, context: int, new: int, *rest: int, **more: Any) -> Self:
        """``batch`` sequences of ``context`` tokens each, ``new`` of them new."""
        return cls((context,) * batch, (new,) * batch, *rest, **more)

    @property
    def kind(self) -> str:
        return "decode" if max(self.news) <= FEW else "prefill"

    @property
    def is_uniform(self) -> bool:
        return len(set(zip(self.lens, self.news, strict=True))) == 1

    @property
    def flops(self) -> int:
        """Of the two products, with each query multiplied by the keys that it sees."""
        seen = sum(new * n - new * (new - 1) // 2 for n, new in zip(self.lens, self.news, strict=True))
        return 4 * self.kv_heads * self.group * self.head_dim * seen

    def __str__(self) -> str:
        new = "" if self.news in {self.lens, (1,) * len(self.lens)} else f" new{self.news[0]}"
        batch = self.note or f"b{len(self.lens)} n{self.lens[0]}{new}"
        size = "" if self.block_size == 16 else f" bs{self.block_size}"
        return f"{self.kind} {batch} kv{self.kv_heads}x{self.group} d{self.head_dim}{size}"


def decode(batch: int, context: int, *rest: int, **more: Any) -> Shape:
    """One new token for each sequence."""
    return Shape.uniform(batch, context, 1, *rest, **more)


def prefill(batch: int, context: int, *rest: int, **more: Any) -> Shape:
    """Whole prompts."""
    return Shape.uniform(batch, context, context, *rest, **more)


AZURE = {
    "code": (
        12, 95, 167, 262, 411, 604, 798, 965, 1099, 1281, 1493, 1712, 1937, 2188, 2455, 2774, 3224, 3965, 5223, 7343,
        7841,
    ),
    "conversation": (
        95, 335, 417, 451, 478, 495, 513, 553, 1278, 1406, 1436, 1460, 1484, 1508, 1535, 1575, 1660, 2245, 4114, 4147,
        14089,
    ),
}  # fmt: skip
"""Tokens of a request, prompt and answer, at each twentieth of the requests that Azure served in November 2023
(Patel et al., Splitwise, ISCA 2024)."""


def served(trace: str, batch: int, *rest: int, whole: bool = False) -> Shape:
    """Lengths as they were served: those of whole prompts, or of sequences that decode their last token."""
    draw, steps = random.Random(batch), AZURE[trace]
    lens = []
    for _ in range(batch):
        at = draw.uniform(0, len(steps) - 1)
        low = min(int(at), len(steps) - 2)
        lens.append(round(steps[low] + (at - low) * (steps[low + 1] - steps[low])))
    return Shape(tuple(lens), tuple(lens) if whole else (1,) * batch, *rest, note=f"b{batch} azure-{trace}")


ON_CPU = [
    decode(batch, context, *heads)
    for batch, context in ((1, 128), (1, 2048), (1, 16384), (8, 1024), (16, 4096), (64, 128), (64, 1024))
    for heads in ((8, 1, 64), (8, 4, 128), (2, 8, 128), (4, 4, 256), (8, 1, 128))
] + [
    prefill(1, context, *heads)
    for context in (512, 2048)
    for heads in ((8, 1, 64), (8, 1, 128), (2, 4, 128), (1, 8, 256))
]

# On an H100 SXM in November 2026: the best of FlashInfer 0.6.18 (with and without tensor cores), TensorRT-LLM's XQA and
# vLLM's Triton kernel, all on shuffled pages of 16, and FlashAttention-3 on contiguous K and V. GB/s of K and V read.
NOTED_DECODE = {
    decode(batch, context, *heads, 128): best
    for heads, batch, context, best in (
        ((8, 4), 1, 1024, 306), ((8, 4), 1, 8192, 1385), ((8, 4), 1, 32768, 2237), ((8, 4), 16, 1024, 2062),
        ((8, 4), 16, 8192, 2840), ((8, 4), 16, 32768, 2999), ((8, 4), 64, 1024, 2684), ((8, 4), 64, 8192, 2987),
        ((8, 4), 256, 1024, 2895), ((8, 4), 256, 8192, 3063), ((8, 8), 1, 8192, 1389), ((8, 8), 16, 1024, 2050),
        ((8, 8), 64, 8192, 2983), ((8, 8), 256, 8192, 3055), ((32, 1), 1, 1024, 1079), ((32, 1), 1, 8192, 2351),
        ((32, 1), 16, 1024, 2764), ((32, 1), 64, 8192, 3070),
    )
}  # fmt: skip
# FlashAttention-3 on pages of 128, TFLOP/s, in the same run.
NOTED_PREFILL = {
    Shape.uniform(batch, context, new, *heads, 128): best
    for heads, batch, new, context, best in (
        ((8, 4), 16, 1024, 1024, 427), ((8, 4), 4, 4096, 4096, 658), ((8, 4), 1, 16384, 16384, 744),
        ((8, 4), 1, 2048, 32768, 743), ((8, 4), 8, 512, 8192, 709), ((32, 1), 4, 4096, 4096, 645),
    )
}  # fmt: skip
ON_GPU = [
    *NOTED_DECODE,
    decode(64, 8192, 8, 4, 64), decode(16, 8192, 8, 4, 64), decode(64, 8192, 8, 2, 256), decode(16, 8192, 8, 2, 256),
    decode(64, 8192, 8, 4, 96), decode(64, 8192, 8, 4, 128, block_size=32), decode(64, 8192, 8, 4, 128, block_size=64),
    decode(16, 1024, 8, 4, 128, block_size=64), decode(64, 8192, 4, 7, 128), decode(128, 2048, 8, 6, 128),
    decode(7, 5000, 8, 4, 128), Shape.uniform(16, 8192, 4, 8, 4, 128),
    served("conversation", 64, 8, 4, 128), served("conversation", 256, 8, 4, 128), served("code", 64, 8, 8, 128),
    *NOTED_PREFILL,
    prefill(4, 4096, 8, 4, 128, block_size=64), prefill(4, 4096, 8, 4, 64), prefill(4, 4096, 8, 2, 256),
    prefill(4, 4096, 4, 7, 128), prefill(64, 300, 8, 4, 128), Shape.uniform(1, 32768, 128, 8, 4, 128),
    Shape.uniform(1, 8192, 512, 8, 4, 128), served("code", 16, 8, 4, 128, whole=True),
    Shape((8192,) * 34, (512, 512, *(1,) * 32), 8, 4, 128, note="2x512 and 32 decodes, n8192"),
]  # fmt: skip


def noted(shape: Shape, seconds: float) -> float | None:
    """How this time compares with what was noted, above 1 being faster; None if nothing was."""
    if shape in NOTED_DECODE:
        bytes_read = 4 * sum(shape.lens) * shape.kv_heads * shape.head_dim
        return bytes_read / seconds / 1e9 / NOTED_DECODE[shape]
    if shape in NOTED_PREFILL:
        return shape.flops / seconds / 1e12 / NOTED_PREFILL[shape]
    return None
