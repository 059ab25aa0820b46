"""Policies and pool sizes side by side: a table of hit ratios beside the best there could be, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pagemgr.optimum import optimum, visits
from pagemgr.replay import replay
from pagemgr.traces import Request

BASELINE = "lru"
OPTIMUM = "optimum"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hit ratios by pool size: of each policy, of ``lru``, and of the optimum."""

    blocks: tuple[int, ...]
    ratios: Mapping[str, tuple[float, ...]]

    def gap_closed(self, policy: str, size: int) -> float | None:
        """Share of what LRU leaves to the optimum that the policy gets; None if LRU leaves nothing."""
        low, high = self.ratios[BASELINE][size], self.ratios[OPTIMUM][size]
        return (self.ratios[policy][size] - low) / (high - low) if high > low else None

    def rows(self) -> list[list[str]]:
        """A line for each policy, a column for each size."""
        return [
            [name, *(self._cell(name, size, ratio) for size, ratio in enumerate(ratios))]
            for name, ratios in self.ratios.items()
        ]

    def _cell(self, name: str, size: int, ratio: float) -> str:
        closed = None if name in (BASELINE, OPTIMUM) else self.gap_closed(name, size)
        return f"{ratio:.4f}" if closed is None else f"{ratio:.4f} ({closed:+.0%})"


def compare(requests: Sequence[Request], sizes: Sequence[int], block_size: int, policies: Sequence[str]) -> Comparison:
    """Replay the trace on each policy, LRU among them, and each number of usable blocks."""
    names = [BASELINE, *(name for name in policies if name != BASELINE)]
    ratios: dict[str, list[float]] = {name: [] for name in (*names, OPTIMUM)}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(sizes) * len(ratios))
        trace = visits(requests, block_size)
        for size in sizes:
            for name in names:
                ratios[name].append(replay(requests, size, block_size, name).stats.hit_ratio)
                progress.advance(task)
            ratios[OPTIMUM].append(optimum(trace, size, block_size))
            progress.advance(task)
    return Comparison(tuple(sizes), {name: tuple(values) for name, values in ratios.items()})


def draw(path: Path, title: str, comparison: Comparison) -> None:
    """Write a PNG: hit ratio against pool size, a line for each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.subplots()
    for name, ratios in comparison.ratios.items():
        style = {"color": "black", "linestyle": "--"} if name == OPTIMUM else {"marker": "o"}
        axes.plot(comparison.blocks, ratios, label=name, **style)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_xlabel("usable blocks")
    axes.set_ylabel("hit ratio by tokens")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")
